"""One stage of training in its own folder, from data to result."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from mmfast.data import MultimodalDataset, make_loader
from mmfast.errors import UserError
from mmfast.models import Encoder
from mmfast.tasks import Task, task_of
from mmfast.training.checkpoint import RECORD, read_checkpoint
from mmfast.training.components import make_module
from mmfast.training.config import Config
from mmfast.training.encoder import check_takes, make_encoder
from mmfast.training.fitting import BEST, LAST, check_device, fit
from mmfast.training.folder import PREDICTIONS, claim, finished, load_result, save_result
from mmfast.training.handover import Handover, load_part
from mmfast.training.memory import check_memory
from mmfast.training.module import StageModule
from mmfast.training.objectives.losses import takes_labels
from mmfast.training.parsing import config_of
from mmfast.training.predictions import evaluation_batches, predict, write_predictions
from mmfast.training.processes import is_main, rank, world_size
from mmfast.training.seeds import derive
from mmfast.training.seen import NONE, Overlap, Seen
from mmfast.training.splits import Splits, require_labels
from mmfast.training.stages import SUPERVISED, Stage, supervised_stage
from mmfast.training.task import task_of_run

log = logging.getLogger(__name__)

FEWEST_STEPS = 150
METHOD = "method"
# What a run's folder is taken by, see :func:`mmfast.training.folder.claim`; entered once all else is accepted.
Place = AbstractContextManager[Path]


class Prepared(NamedTuple):
    """A stage that can start.

    Attributes:
        module: the network.
        train: batches.
        valid: batches, or None where nothing is validated.
        handover: part -> how much of it was taken over; empty where weights are random.
    """

    module: StageModule
    train: DataLoader
    valid: DataLoader | None
    handover: dict[str, Handover]


def outcome(stage: Stage) -> str:
    """The checkpoint in a stage's folder that holds its outcome: its best epoch, or its last where none is chosen."""
    return LAST if stage.settings.monitor is None else BEST


def run_stage(
    config: Config, stage: Stage, splits: Splits, place: Place, source: Path | None = None
) -> dict[str, Any]:
    """Train, and test a stage with labels on the weights that count. Goes on where it stopped.

    Args:
        source: outcome of the stage before, from which ``stage.take`` is taken; random weights without it.

    Returns:
        The result: epochs, optimiser steps, seconds of this sitting, numbers of samples, what each epoch logged; with
        a monitor the best epoch and its value; with labels also tensors handed over and test metrics (None without
        test samples).

    Raises:
        UserError: as :func:`prepare` and ``place``; a loss that is not finite, a checkpoint that cannot be saved.
    """
    began = time.monotonic()
    module, train, valid, handover = prepare(config, stage, splits, source)
    settings, monitor = stage.settings, stage.settings.monitor
    if stage.least > 1 and (size := len(train.dataset)) < settings.batch_size:
        log.info(
            "%s: only %d samples, fewer than one batch of %d: each step takes all of them",
            stage.name,
            size,
            settings.batch_size,
        )
    for part, count in handover.items():
        log.info("%s: loaded %s of the %s from %s", stage.name, count, part, source)
    with place as folder:
        if (done := load_result(folder)) is not None:
            return done
        with module.encoded(train.dataset, splits.valid):
            history = fit(
                module,
                train,
                valid,
                folder,
                config.run,
                settings.epochs,
                monitor=monitor,
                better=settings.better,
                patience=settings.patience,
            )
        best = read_checkpoint(folder / outcome(stage))
        module.load_state_dict(best["state_dict"])
        trained = "train" if stage.labels else "inputs"
        others = ("valid", "test") if stage.labels else ("valid",)
        result = {
            "kind": stage.kind,
            "epochs": len(history),
            "steps": len(train) * len(history),
            "seconds": round(time.monotonic() - began, 2),
            "samples": {
                trained: len(train.dataset),
                **{name: len(getattr(splits, name)) for name in others},
            },
            "handover": {part: count._asdict() for part, count in handover.items()},
            "history": history,
        }
        if monitor is not None:
            result |= {"best_epoch": best["epoch"], monitor: history[best["epoch"]][monitor]}
        if stage.labels:
            seen = {name: count._asdict() for name, count in tested_on_seen(module, splits).items()}
            result |= {"task": module.task.state(), "seen": seen, "metrics": _test(module, splits, folder)}
        if is_main():
            save_result(folder, result)
    return result


def run_method(
    config: Config, stages: Sequence[Stage], splits: Splits, place: Place, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Stages one after the other, each in a folder of its name, each from the outcome of the one before.

    Goes on where it stopped; what is complete is not repeated.

    Args:
        place, inputs: of the whole; ``inputs`` as for :func:`~mmfast.training.folder.claim`.

    Returns:
        The result: seconds of this sitting, stage -> what :func:`run_stage` returns, and the last stage's metrics.

    Raises:
        UserError: what any of the stages refuses, before the first of them starts.
    """
    began = time.monotonic()
    for stage in stages:
        prepare(config, stage, splits)
    with place as root:
        if (done := load_result(root)) is not None:
            return done
        results: dict[str, Any] = {}
        source = None
        for stage in stages:
            folder = root / stage.name
            # Relative, so that a method that was moved is still the same.
            settings = {**asdict(config), "stage": stage.describe(), "from": source and source.name}
            results[stage.name] = finished(folder, settings, inputs) or run_stage(
                config, stage, splits, claim(folder, settings, None, inputs), source
            )
            source = folder / outcome(stage)
        result = {
            "kind": METHOD,
            "seconds": round(time.monotonic() - began, 2),
            "stages": results,
            "metrics": results[stages[-1].name].get("metrics"),
        }
        if is_main():
            save_result(root, result)
    return result


def prepare(
    config: Config, stage: Stage, splits: Splits, source: Path | None = None, processes: int = 1
) -> Prepared:
    """The network with its objectives, and its batches: whatever can be refused before the first step is.

    ``processes`` is how many such runs go side by side; ``source`` as for :func:`run_stage`.

    Raises:
        UserError: too few samples, no labelled training or validation samples, weights that do not fit, settings
            that a part or the task refuses, a loss by classes on data without, a class without training samples, a
            device that is not there, memory that is not free.
    """
    check_device(config.run)
    if stage.labels:
        require_labels({"train": splits.train, "valid": splits.valid})
    samples = samples_of(config, stage, splits)
    size, wanted = len(samples), stage.settings.batch_size
    if size < stage.least:
        raise UserError(
            f"{stage.name}: there must be at least {stage.least} training samples for a step, got {size}"
        )
    check_shared(stage, size)
    checkpoint = source and read_checkpoint(source)
    before = checkpoint and checkpoint[RECORD]["seen"]
    labels = stage.labels or by_classes(config, stage)
    seen = Seen.by(splits, labels, stage.settings.monitor is not None, before)
    task = task_of_run(config.task, splits) if stage.labels else None
    record = _record(config, stage, splits, seen, task)
    module = make_module(config, splits.features, stage, record, task)
    check_takes(module.encoder, samples, splits.valid, *([splits.test] if stage.labels else []))
    handover = {}
    for part in stage.take if checkpoint else ():
        handover[part] = load_part(getattr(module, part), checkpoint["state_dict"], part, str(source))
    # A loss between samples is not that of a whole batch in an incomplete one.
    train = make_loader(
        samples,
        min(size, wanted),
        shuffle=True,
        drop_last=stage.least > 1,
        seed=derive(config.run.seed, stage.purpose("batches")),
        rank=rank(),
        world_size=world_size(),
    )
    if not module.cached:
        views = sum(objective.views for objective in module.objectives.values())
        check_memory(stage.where, module.encoder, train, views, config.run, processes)
    enough = len(splits.valid) >= stage.least
    monitor = stage.settings.monitor or ""
    if not enough and monitor.startswith("valid_"):
        raise UserError(
            f"{stage.name}: there must be at least {stage.least} validation samples for the monitor {monitor}, "
            f"got {len(splits.valid)}"
        )
    return Prepared(
        module, train, evaluation_batches(splits.valid, shared=True) if enough else None, handover
    )


def check_shared(stage: Stage, samples: int) -> None:
    """Refuse a step that leaves a process without a sample, but for the last of an epoch."""
    each = world_size()
    if stage.settings.batch_size < each:
        raise UserError(
            f"config: {stage.where}.batch_size must be at least the {each} processes that share it, "
            f"got {stage.settings.batch_size}"
        )
    if samples < each:
        raise UserError(
            f"{stage.name}: there must be at least one training sample for each of {each} processes, got {samples}"
        )


def by_classes(config: Config, stage: Stage) -> bool:
    """Whether samples of the stage are told apart by their classes."""
    return "two_views" in stage.objectives and takes_labels(config.loss)


def samples_of(config: Config, stage: Stage, splits: Splits) -> MultimodalDataset:
    """What a stage trains on.

    Raises:
        UserError: its loss is by classes, and the data have other labels or none.
    """
    if not by_classes(config, stage):
        return splits.train if stage.labels else splits.inputs
    if splits.task != "classification":
        raise UserError(
            f"config: loss.name {config.loss.name} must have samples of one class each to go by labels, the data "
            f"have {splits.task} of {', '.join(splits.targets)}"
        )
    require_labels({"train": splits.train})
    return splits.train


def few_steps(config: Config, stage: Stage, splits: Splits) -> str | None:
    """A sentence about training without labels that stops before it has begun to learn, or None.

    On 300 samples a correlation grew from 20 to 160 steps; the thesis' runs take 1,900.
    """
    size = len(samples_of(config, stage, splits))
    each = size // min(size, stage.settings.batch_size) if size else 0
    steps = each * stage.settings.epochs
    if stage.labels or steps >= FEWEST_STEPS:
        return None
    return (
        f"{steps} optimiser steps of pre-training ({each} an epoch) are fewer than {FEWEST_STEPS}, too few to learn "
        f"much; raise {stage.where}.epochs or lower {stage.where}.batch_size"
    )


def tested_on_seen(module: StageModule, splits: Splits) -> dict[str, Overlap]:
    """``valid``, ``test`` -> their samples that the run sees otherwise, if any: copies, or inputs of pre-training."""
    seen = Seen(**module.record["seen"])
    counts = {"valid": seen._replace(selection=NONE).overlap(splits.valid), "test": seen.overlap(splits.test)}
    return {name: count for name, count in counts.items() if any(count)}


def restore(path: Path) -> tuple[StageModule, dict[str, Any]]:
    """The encoder and head of a stage with labels, and its record, from its checkpoint.

    Raises:
        UserError: not a checkpoint of such a stage, or weights that do not fit its own configuration.
    """
    checkpoint = read_checkpoint(path, SUPERVISED)
    record = checkpoint[RECORD]
    config = config_of(record["config"])
    task = task_of(record["task"])
    module = make_module(config, record["features"], supervised_stage(config), task=task)
    for part in module.parts:
        load_part(getattr(module, part), checkpoint["state_dict"], part, str(path))
    return module, record


def restore_encoder(path: Path) -> tuple[Encoder, dict[str, Any]]:
    """The encoder and the record of a checkpoint of either phase; errors as of :func:`restore`."""
    checkpoint = read_checkpoint(path)
    record = checkpoint[RECORD]
    encoder = make_encoder(config_of(record["config"]).model, record["features"])
    load_part(encoder, checkpoint["state_dict"], "encoder", str(path))
    return encoder, record


def _record(config: Config, stage: Stage, splits: Splits, seen: Seen, task: Task | None) -> dict[str, Any]:
    return {
        "kind": stage.kind,
        "config": asdict(config),
        "stage": stage.describe(),
        "features": dict(splits.features),
        "standardiser": splits.standardiser.state_dict(),
        "task": task and task.state(),
        "data": splits.fingerprint,
        "seen": seen._asdict(),
    }


def _test(module: StageModule, splits: Splits, folder: Path) -> Mapping[str, float] | None:
    if len(splits.test) == 0 or not is_main():
        return None
    predictions = predict(module, splits.test)
    write_predictions(folder / PREDICTIONS, splits.test, predictions, module.task)
    return module.task.metrics(predictions, splits.test.labels)
