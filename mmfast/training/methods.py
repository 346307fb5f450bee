"""Methods: lists of stages, from a table or a YAML file. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentParser

from mmfast.errors import UserError
from mmfast.training.config import Config, PretrainingConfig, SupervisedConfig, check_stage
from mmfast.training.model_section import encoder_name
from mmfast.training.objectives import OBJECTIVES
from mmfast.training.parsing import config_of
from mmfast.training.settings import Settings
from mmfast.training.stages import PRETRAINING, SUPERVISED, Stage
from mmfast.wording import guess, one_of

STAGES = "stages"


class Method(NamedTuple):
    """A list of stages: each a mapping of ``name``, ``objectives``, and settings that differ from its section's.

    Attributes:
        title: what it is.
        stages: the mappings.
        sections: settings that stand in the place of an experiment's.
        source: what errors call it.
    """

    title: str
    stages: Sequence[Mapping[str, Any]]
    sections: Mapping[str, Any] = {}
    source: str = ""


_TWO_VIEWS = {"name": PRETRAINING, "objectives": {"two_views": 1.0}}
_LABELS = {"name": SUPERVISED, "objectives": {"supervised": 1.0}}
_LINEAR = {**_LABELS, "frozen": {"encoder": True}}

# Thesis section 7.1.
METHODS = {
    "FS": Method("fully supervised", (_LABELS,)),
    "SLE": Method("linear evaluation of a random encoder", (_LINEAR,)),
    "SSL": Method("self-supervised pre-training, then fine-tuning", (_TWO_VIEWS, _LABELS)),
    "LE": Method("linear evaluation of the pre-trained encoder", (_TWO_VIEWS, _LINEAR)),
}


# Of a method's file, what an experiment takes: all its methods have the same data, task and run.
_OWN = ("model", "augmentation", "loss", "pretraining", "supervised")


def methods_of(names: Sequence[str], taken: Collection[str] = ()) -> dict[str, Method]:
    """Row of an experiment -> method: names of :data:`METHODS`, or YAML files, whose rows are their names.

    Args:
        names: what ``experiment.methods`` says.
        taken: names of rows that there are beside.

    Raises:
        UserError: neither a method nor a file, a file that is no method, or two rows of one name.
    """
    methods: dict[str, Method] = {}
    for name in names:
        row = name if name in METHODS else Path(name).stem
        if name not in METHODS and Path(name).suffix not in (".yaml", ".yml"):
            raise UserError(
                f"config: experiment.methods must be some of {', '.join(METHODS)} or YAML files of methods, got "
                f"{name!r}{guess(name, METHODS)}"
            )
        if row in methods or row in taken or (row in METHODS and name not in METHODS):
            raise UserError(
                f"config: experiment.methods must have each name once, got {row!r} again by {name!r}"
            )
        methods[row] = METHODS[name] if name in METHODS else _of_file(name)
    return methods


def _of_file(path: str) -> Method:
    stages, values = read_method(path)
    sections = {name: values[name] for name in _OWN if name in values}
    title = ", then ".join(str(stage.get("name")) for stage in stages)
    return Method(f"{title} ({path})", stages, sections, f"method {path}")


def config_for(method: Method, config: Config) -> Config:
    """An experiment's configuration with what the method's file says in its place."""
    if not method.sections:
        return config
    values = asdict(config)
    if encoder_name(method.sections) != encoder_name(values):
        values["model"] = {"projector": values["model"]["projector"]}
    try:
        return config_of(_merged(values, method.sections))
    except UserError as error:
        raise UserError(f"{method.source}: {str(error).removeprefix('config: ')}") from error


def _merged(values: Any, others: Any) -> Any:
    if not (isinstance(values, Mapping) and isinstance(others, Mapping)):
        return others
    return {**values, **{name: _merged(values.get(name), other) for name, other in others.items()}}


def read_method(path: str) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    """The stages in a YAML file, unchecked, and what else it holds: sections of settings.

    Raises:
        UserError: a file that cannot be read or is not YAML, or without stages.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"method {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}: {error.problem}" if mark else ""
        raise UserError(f"method {path}: not YAML{where}") from error
    given = values.pop(STAGES, None) if isinstance(values, dict) else None
    if not isinstance(given, list) or not given or not all(isinstance(stage, dict) for stage in given):
        told = "nothing" if given is None else repr(given)
        raise UserError(
            f"method {path}: stages must be a list of one stage or more, each with a name and objectives, got {told}"
        )
    return given, values


def stages_of(config: Config, given: Sequence[Mapping[str, Any]], source: str = "") -> list[Stage]:
    """The stages of a method. What one does not say stands in ``supervised``, if it needs labels, or ``pretraining``.

    Args:
        given: of each stage ``name``, ``objectives`` (name -> weight), settings, and ``take``: the parts that it
            takes from the stage before, the encoder when left out.
        source: what errors call the file that the stages are from; those of the table are told by their sections.

    Raises:
        UserError: says where in the method something is missing, unknown, of the wrong type or out of range; a part
            that a stage does not have.
    """
    stages: list[Stage] = []
    for number, values in enumerate(given):
        stages.append(_stage(config, values, f"{source}: stages[{number}]" if source else "", stages))
    return stages


def _stage(config: Config, values: Mapping[str, Any], where: str, before: Sequence[Stage]) -> Stage:
    of_file = bool(where)
    name = values.get("name")
    if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
        raise UserError(
            f"{where}: name must be letters, digits, - and _, for it names a folder, got {_told(name)}"
        )
    if name in (stage.name for stage in before):
        raise UserError(f"{where}: name must be another than those of the stages before, got {name!r}")
    where = f"{where} {name}"
    objectives = _objectives(values.get("objectives"), where)
    labels = any(OBJECTIVES[objective].labels for objective in objectives)
    section = config.supervised if labels else config.pretraining
    own = _settings(values, type(section), where, labels)
    take = _taken(values.get("take"), where)
    called = f"{STAGES}.{name}" if of_file else SUPERVISED if labels else PRETRAINING
    try:
        stage = Stage(name, objectives, replace(section, **own), called, take)
        check_stage(stage.settings, stage.where, stage.least)
    except UserError as error:
        if not of_file:
            raise
        raise UserError(f"{where}: {str(error).removeprefix('config: ')}") from error
    if before and (missing := [part for part in take if part not in before[-1].parts]):
        known = before[-1].parts
        raise UserError(
            f"{where}: take must name parts of the stage before, {', '.join(known)}, got {missing[0]!r}"
            f"{guess(missing[0], known)}"
        )
    return stage


def _objectives(given: Any, where: str) -> dict[str, float]:
    if not isinstance(given, Mapping) or not given:
        raise UserError(
            f"{where}: objectives must be a mapping of names to weights such as {{supervised: 1}}, got {_told(given)}"
        )
    for name, weight in given.items():
        if name not in OBJECTIVES:
            raise UserError(
                f"{where}: an objective must be {one_of(OBJECTIVES)}, got {name!r}{guess(str(name), OBJECTIVES)}"
            )
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < inf:
            raise UserError(f"{where}: the weight of {name} must be a positive number, got {_told(weight)}")
    return {name: float(weight) for name, weight in given.items()}


def _taken(given: Any, where: str) -> tuple[str, ...]:
    if given is None:
        return ("encoder",)
    if not isinstance(given, list) or not all(isinstance(part, str) for part in given):
        raise UserError(f"{where}: take must be a list of parts such as [encoder], got {_told(given)}")
    return tuple(given)


def _settings(values: Mapping[str, Any], kind: type, where: str, labels: bool) -> dict[str, Any]:
    """The settings in a stage's mapping, in their types."""
    settings = Settings(kind)
    own = {key: value for key, value in values.items() if key not in ("name", "objectives", "take")}
    for key in own:
        if key not in settings.types:
            other = SupervisedConfig if kind is PretrainingConfig else PretrainingConfig
            if key in {field.name for field in fields(other)}:
                raise UserError(
                    f"{where}: there is no setting {key} for a stage {'with' if labels else 'without'} labels"
                )
            known = [*settings.types, "name", "objectives", "take"]
            raise UserError(f"{where}: there is no setting {key}{guess(str(key), known)}")
    if reason := settings.wrong(own):
        raise UserError(f"{where}: {reason}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, None)
    parsed = parser.parse_object(own)
    return {key: getattr(parsed, key) for key in own}


def _told(value: Any) -> str:
    return "nothing" if value is None else repr(value)
