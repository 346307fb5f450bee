"""What the training commands are told: from a command line to namespaces.

Nothing here needs torch, so that help and refusals come at once.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mmfast.cli.flags import Parser
from mmfast.cli.presets import PRESETS
from mmfast.cli.refusals import wrong_arguments
from mmfast.errors import UserError
from mmfast.training.config import SPLITS, ExperimentConfig, check_experiment
from mmfast.training.launched import as_launched, several
from mmfast.training.methods import read_method, stages_of
from mmfast.training.model_section import SHARED, config_type, encoder_name, open_config_type
from mmfast.training.parsing import config_parser, sections
from mmfast.training.settings import Settings, in_plain_words

EITHER = "last.ckpt of a pretrain run or best.ckpt of a finetune run"


def pretrain(argv: list[str]) -> Any:
    """The arguments of ``mmfast pretrain``."""
    line = _Line("pretrain", "Self-supervised pre-training; writes last.ckpt.", argv)
    line.add_resume()
    return line.parse()


def finetune(argv: list[str], defaults: Mapping[str, Any] | None = None) -> Any:
    """The arguments of ``mmfast finetune``.

    ``argv`` is among them, for another call with a checkpoint's ``defaults``.
    """
    line = _Line("finetune", "Supervised training; writes best.ckpt and tests it.", argv, defaults)
    line.add("from", str | None, "Checkpoint of a pre-training run; random weights without it.")
    line.add("freeze", bool, "Train only the linear head (linear evaluation).", default=False)
    line.add_resume()
    given = line.parse()
    given.argv = argv
    return given


def train(argv: list[str]) -> Any:
    """The arguments of ``mmfast train``: a method's ``stages`` among them, in the settings and as the file has them.

    The file's sections stand behind flags and ``--config`` and before the preset.
    """
    path = argv[0] if argv and not argv[0].startswith("-") else None
    given, values = ([], {}) if path is None else read_method(path)
    words = argv if path is None else argv[1:]
    line = _Line(
        "train",
        "Stages of training one after the other, each in its own folder (docs/training.md shows a file).",
        words,
        values,
    )
    line.parser.usage = f"%(prog)s METHOD.yaml {line.parser.usage.partition(' ')[2]}"
    line.add_resume()
    if path is None and not {"-h", "--help"} & set(argv):
        raise UserError("train: the first word must be a YAML file with stages (see mmfast train --help)")
    if reason := line.settings.wrong(values):
        raise UserError(f"method {path}: {reason}")
    known = line.parse()
    known.stages = stages_of(known.settings, given, f"method {path}")
    known.method = [dict(stage) for stage in given]
    known.argv = argv
    return known


def experiment(argv: list[str]) -> Any:
    """The arguments of ``mmfast experiment``, ``argv`` among them, for the report."""
    line = _Line(
        "experiment",
        "Methodologies over seeds and folds, with a report; the same command goes on where it stopped.",
        argv,
    )
    line.add_section("experiment", ExperimentConfig)
    given = line.parse()
    check_experiment(given.experiment)
    if several(run := given.settings.run):
        raise UserError(
            "experiment: run.devices and run.nodes must be 1 and run.strategy auto, for whole runs go side by side "
            f"(experiment.workers), got {run.devices}, {run.nodes} and {run.strategy}"
        )
    given.argv = argv
    return given


def evaluate(argv: list[str]) -> argparse.Namespace:
    """The arguments of ``mmfast evaluate``."""
    parser = Parser(
        prog="mmfast evaluate",
        description="Metrics of a fine-tuned checkpoint on samples that it was not trained on.",
    )
    _add_source(parser, split="test")
    parser.add_argument("--out", help="write the metrics as JSON to this file")
    return parser.parse_args(argv)


def predict(argv: list[str]) -> argparse.Namespace:
    """The arguments of ``mmfast predict``."""
    parser = Parser(
        prog="mmfast predict",
        description="Predictions of a fine-tuned checkpoint as CSV: name, prediction and truth of each sample.",
    )
    _add_source(parser, split="all")
    parser.add_argument("--out", default="predictions.csv", help="the file to write (default %(default)s)")
    return parser.parse_args(argv)


def embed(argv: list[str]) -> argparse.Namespace:
    """The arguments of ``mmfast embed``."""
    parser = Parser(
        prog="mmfast embed",
        description="Vectors that the encoder of a checkpoint makes of each sample, as an .npz archive "
        "(its keys: docs/training.md).",
    )
    _add_source(parser, split="all", checkpoint=EITHER)
    parser.add_argument("--out", default="embeddings.npz", help="the file to write (default %(default)s)")
    return parser.parse_args(argv)


def export(argv: list[str]) -> argparse.Namespace:
    """The arguments of ``mmfast export``."""
    parser = Parser(
        prog="mmfast export",
        description="The encoder of a checkpoint, and its head or projector, as safetensors: "
        "mmfast.training.load_encoder reads them (docs/training.md).",
    )
    parser.add_argument("checkpoint", help=EITHER)
    parser.add_argument(
        "--out", default="encoder.safetensors", help="the file to write (default %(default)s)"
    )
    return parser.parse_args(argv)


def _add_source(
    parser: argparse.ArgumentParser, split: str, checkpoint: str = "best.ckpt of a finetune run"
) -> None:
    parser.add_argument("checkpoint", help=checkpoint)
    parser.add_argument("--data", help="file or folder of features; the run's own data when left out")
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default=split,
        help="which samples: a part of the data, all, or those that the run has not seen (default %(default)s)",
    )


def _take(flag: str, argv: list[str]) -> tuple[list[str | None], list[str]]:
    """The values of a flag, None where there is none, and what else is on the line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{flag}", nargs="?", action="append", default=[])
    found, rest = parser.parse_known_args(argv)
    return getattr(found, flag), rest


# Settings that take several words: --data.path a b is --data.path '["a", "b"]'.
SEVERAL = ("--data.path", "--data.pool")


def _gathered(argv: list[str]) -> list[str]:
    """The words, those behind a flag that takes several as one list."""
    out: list[str] = []
    words = deque(argv)
    while words:
        out.append(words.popleft())
        if out[-1] in SEVERAL:
            values = []
            while words and not words[0].startswith("-"):
                values.append(words.popleft())
            out += values if len(values) < 2 else [json.dumps(values)]
    return out


def _told(name: str, argv: list[str]) -> Any:
    """The value of a setting on a command line or in its files, before its parser is there; None if it has none."""
    section, _, key = name.rpartition(".")
    found = []
    for file in filter(None, _take("config", argv)[0]):
        values = _mapping(file)
        if section:
            values = _mapping(values.get(section), Path(file).parent)
        found.append(values.get(key))
    if section:
        found += [_mapping(value).get(key) for value in _take(section, argv)[0]]
    found += _take(name, argv)[0]
    return next((value for value in reversed(found) if value is not None), None)


def _mapping(given: Any, folder: Path = Path()) -> Mapping[str, Any]:
    """Settings that stand in a word or in the YAML file that it names; none where they cannot be read."""
    for read in (
        lambda: given,
        lambda: yaml.safe_load(given),
        lambda: yaml.safe_load((folder / given).read_text()),
    ):
        try:
            if isinstance(values := read(), Mapping):
                return values
        except (OSError, yaml.YAMLError, AttributeError, TypeError, ValueError):
            continue
    return {}


class _Line:
    """The command line of a command that has settings.

    Args:
        command: its name.
        description: one line of help.
        argv: its words.
        defaults: settings that stand behind flags and files and before the preset, such as a checkpoint's.
    """

    def __init__(
        self, command: str, description: str, argv: list[str], defaults: Mapping[str, Any] | None = None
    ) -> None:
        argv = _gathered(argv)
        self.command, self.argv, self.defaults = command, argv, dict(defaults or {})
        told = _told("model.encoder", argv)
        self.encoder = encoder_name(self.defaults) if told is None else str(told)
        # A checkpoint that is still to be read knows the encoder, and what it takes.
        ahead = command == "finetune" and not defaults and _told("from", argv) and "--help" not in argv
        self.kind = open_config_type() if ahead and told is None else config_type(self.encoder)
        self.parser = config_parser(
            f"mmfast {command}",
            f"{description} A flag given twice counts as given last; flags go before --config before --preset.",
            self.kind,
        )
        self.settings = Settings(self.kind)
        presets = "; ".join(f"{name}: {preset.help}" for name, preset in PRESETS.items())
        self.parser.usage = "%(prog)s [--preset NAME] [--config FILE] [--SETTING VALUE ...]"
        self.parser.add_argument(
            "--preset", choices=list(PRESETS), help=f"Settings to start from. {presets}.", metavar="NAME"
        )

    def add(self, name: str, kind: Any, text: str, default: Any = None) -> None:
        """A setting of this command alone."""
        self.parser.add_argument(f"--{name}", type=kind, default=default, help=text)
        self.settings.add(name, kind)

    def add_section(self, name: str, kind: type) -> None:
        """A dataclass of settings of this command alone."""
        self.parser.add_class_arguments(kind, name)
        self.settings.add(name, kind)

    def add_resume(self) -> None:
        self.parser.add_argument("--resume", action="store_true", help="Go on with the run in run.folder.")
        self.settings.add("resume", bool)

    def parse(self) -> Any:
        """The arguments, with the checked configuration as ``settings``.

        Flags come before the configuration file before ``defaults`` before the preset.
        """
        argv = self.argv
        preset = [None, *_take("preset", argv)[0]][-1]
        files, rest = _take("config", argv)
        if None not in files:
            # In front, for the parser lets the later one win.
            argv = [*(f"--config={file}" for file in files), *rest]
        if preset in PRESETS:
            known, chosen = self.parser.get_defaults(), PRESETS[preset].settings
            self._set_defaults({name: values for name, values in chosen.items() if name in known})
        self._set_defaults(self.defaults)
        try:
            given = self.parser.parse_args(argv)
        except argparse.ArgumentError as error:
            reason = wrong_arguments(self.parser, self.settings, argv) or in_plain_words(error, self.settings)
            raise self._refusal(reason) from error
        if given.preset != preset:
            raise self._refusal("preset must be given as a flag, --preset NAME, not in a file")
        # The parser lets a None pass where a number must be: what an empty line of a YAML file says.
        if reason := self.settings.wrong({name: given.as_dict()[name] for name in self.settings.top}):
            raise self._refusal(wrong_arguments(self.parser, self.settings, argv) or reason)
        if (named := encoder_name(given.as_dict())) != self.encoder:
            raise self._refusal(
                f"model.encoder must be the same wherever it is given, got {self.encoder} and {named}"
            )
        given = self.parser.instantiate(given)
        given.settings = sections(given, self.kind)
        given.settings.run = as_launched(given.settings.run)
        return given

    def _set_defaults(self, values: Mapping[str, Any]) -> None:
        """Of another encoder's settings only what all have is taken."""
        if "model" in values and encoder_name(values) != self.encoder:
            shared = {name: value for name, value in values["model"].items() if name in SHARED[1:]}
            values = {**values, "model": shared}
        if values:
            self.parser.set_defaults(dict(values))

    def _refusal(self, reason: str) -> UserError:
        return UserError(f"{self.command}: {reason} (see {self.parser.prog} --help)")
