"""One run of either phase in its own folder, from data to result."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from mmfast.data import make_loader
from mmfast.errors import UserError
from mmfast.models import Encoder
from mmfast.training.checkpoint import PRETRAINING, RECORD, SUPERVISED, read_checkpoint
from mmfast.training.components import make_encoder, make_pretraining, make_supervised
from mmfast.training.config import Config
from mmfast.training.encoder import check_takes
from mmfast.training.fitting import BEST, check_device, fit
from mmfast.training.folder import PREDICTIONS, load_result, save_result
from mmfast.training.handover import Handover, load_part
from mmfast.training.memory import check_memory
from mmfast.training.parsing import config_of
from mmfast.training.predictions import evaluation_batches, measure, predict, write_predictions
from mmfast.training.pretraining import Pretraining
from mmfast.training.seeds import derive
from mmfast.training.seen import NONE, Overlap, Seen
from mmfast.training.splits import Splits, require_labels
from mmfast.training.supervised import Supervised

log = logging.getLogger(__name__)


FEWEST_STEPS = 150
# What a run's folder is taken by, see :func:`mmfast.training.folder.claim`; entered once all else is accepted.
Place = AbstractContextManager[Path]


def pretrain(config: Config, splits: Splits, place: Place) -> dict[str, Any]:
    """Pre-train on ``splits.inputs``; ``last.ckpt`` in the folder holds the outcome. Goes on where it stopped.

    Returns:
        The result: epochs, optimiser steps, seconds of this sitting, numbers of samples, what each epoch logged.

    Raises:
        UserError: as :func:`prepare_pretraining` and ``place``; a loss that is not finite, a checkpoint that cannot
            be saved.
    """
    began = time.monotonic()
    module, batches = prepare_pretraining(config, splits)
    valid = evaluation_batches(splits.valid) if len(splits.valid) > 1 else None
    with place as folder:
        if (done := load_result(folder)) is not None:
            return done
        history = fit(module, batches, valid, folder, config.run, config.pretraining.epochs)
        result = {
            "kind": PRETRAINING,
            "epochs": len(history),
            "steps": len(batches) * len(history),
            "seconds": round(time.monotonic() - began, 2),
            "samples": {"inputs": len(splits.inputs), "valid": len(splits.valid)},
            "history": history,
        }
        save_result(folder, result)
    return result


def prepare_pretraining(config: Config, splits: Splits, processes: int = 1) -> tuple[Pretraining, DataLoader]:
    """The network with its views and loss, and its batches: whatever can be refused before the first step is.

    ``processes`` is how many such runs go side by side.

    Raises:
        UserError: fewer than two samples, settings that a part refuses, a device that is not there, memory that is
            not free.
    """
    check_device(config.run)
    size = len(splits.inputs)
    if size < 2:
        raise UserError(f"pretrain: Barlow Twins needs at least 2 training samples, got {size}")
    wanted = config.pretraining.batch_size
    if size < wanted:
        log.info(
            "pretrain: only %d samples, fewer than one batch of %d: each step takes all of them", size, wanted
        )
    record = _record(PRETRAINING, config, splits, Seen.by_pretraining(splits))
    module = make_pretraining(config, splits.features, record)
    check_takes(module.encoder, splits.inputs, splits.valid)
    batches = make_loader(
        splits.inputs,
        min(size, wanted),
        shuffle=True,
        drop_last=True,
        seed=derive(config.run.seed, "batches"),
    )
    check_memory("pretraining", module.encoder, batches, 2, config.run, processes)
    return module, batches


def finetune(
    config: Config, splits: Splits, place: Place, pretrained: Path | None = None, freeze: bool = False
) -> dict[str, Any]:
    """Train with labels, test the epoch that had the lowest validation loss. Goes on where it stopped.

    Args:
        pretrained: checkpoint of a pre-training run whose encoder to start from; random weights without it.
        freeze: linear evaluation, only the head learns.

    Returns:
        The result: epochs, optimiser steps, best epoch, seconds of this sitting, numbers of samples, tensors handed
        over, what each epoch logged, test metrics (None without test samples).

    Raises:
        UserError: as :func:`prepare_finetuning` and ``place``; a loss that is not finite, a checkpoint that cannot be
            saved.
    """
    began = time.monotonic()
    module, batches, handover = prepare_finetuning(config, splits, pretrained, freeze)
    settings = config.supervised
    with place as folder:
        if (done := load_result(folder)) is not None:
            return done
        with module.encoded(splits.train, splits.valid):
            history = fit(
                module,
                batches,
                evaluation_batches(splits.valid),
                folder,
                config.run,
                settings.epochs,
                monitor="valid_loss",
                patience=settings.patience,
            )
        best = read_checkpoint(folder / BEST)
        module.load_state_dict(best["state_dict"])
        result = {
            "kind": SUPERVISED,
            "epochs": len(history),
            "steps": len(batches) * len(history),
            "best_epoch": best["epoch"],
            "valid_loss": history[best["epoch"]]["valid_loss"],
            "seconds": round(time.monotonic() - began, 2),
            "samples": {name: len(getattr(splits, name)) for name in ("train", "valid", "test")},
            "handover": handover and handover._asdict(),
            "history": history,
            "seen": {name: count._asdict() for name, count in tested_on_seen(module, splits).items()},
            "metrics": _test(module, splits, folder),
        }
        save_result(folder, result)
    return result


def few_steps(config: Config, splits: Splits) -> str | None:
    """A sentence about pre-training that stops before it has begun to learn, or None.

    On 300 samples a correlation grew from 20 to 160 steps; the thesis' runs take 1,900.
    """
    each = len(splits.inputs) // min(len(splits.inputs), config.pretraining.batch_size)
    steps = each * config.pretraining.epochs
    if steps >= FEWEST_STEPS:
        return None
    return (
        f"{steps} optimiser steps of pre-training ({each} an epoch) are fewer than {FEWEST_STEPS}, too few to learn "
        "much; raise pretraining.epochs or lower pretraining.batch_size"
    )


def prepare_finetuning(
    config: Config,
    splits: Splits,
    pretrained: Path | None = None,
    freeze: bool = False,
    processes: int = 1,
) -> tuple[Supervised, DataLoader, Handover | None]:
    """As :func:`prepare_pretraining`; also how much of a pre-trained encoder was taken over.

    Raises:
        UserError: no labelled training or validation samples, weights that do not fit, settings that a part refuses,
            a device that is not there, memory that is not free.
    """
    check_device(config.run)
    require_labels({"train": splits.train, "valid": splits.valid})
    checkpoint = pretrained and read_checkpoint(pretrained, PRETRAINING)
    seen = Seen.by_finetuning(splits, checkpoint and checkpoint[RECORD])
    record = _record(SUPERVISED, config, splits, seen, freeze)
    module = make_supervised(config, splits.features, freeze, record)
    check_takes(module.encoder, splits.train, splits.valid, splits.test)
    handover = None
    if checkpoint is not None:
        handover = load_part(module.encoder, checkpoint["state_dict"], "encoder", str(pretrained))
        log.info("finetune: loaded %s of the encoder from %s", handover, pretrained)
    batches = make_loader(
        splits.train,
        config.supervised.batch_size,
        shuffle=True,
        drop_last=False,
        seed=derive(config.run.seed, "batches"),
    )
    if not freeze:
        check_memory("supervised", module.encoder, batches, 1, config.run, processes)
    return module, batches, handover


def tested_on_seen(module: Supervised, splits: Splits) -> dict[str, Overlap]:
    """``valid``, ``test`` -> their samples that the run sees otherwise, if any: copies, or inputs of pre-training."""
    seen = Seen(**module.record["seen"])
    counts = {"valid": seen._replace(selection=NONE).overlap(splits.valid), "test": seen.overlap(splits.test)}
    return {name: count for name, count in counts.items() if any(count)}


def restore(path: Path) -> tuple[Supervised, dict[str, Any]]:
    """A supervised run's network and record from its checkpoint.

    Raises:
        UserError: not a checkpoint of a supervised run, or weights that do not fit its own configuration.
    """
    checkpoint = read_checkpoint(path, SUPERVISED)
    record = checkpoint[RECORD]
    module = make_supervised(config_of(record["config"]), record["features"], record["freeze"])
    for part in ("encoder", "head"):
        load_part(getattr(module, part), checkpoint["state_dict"], part, str(path))
    return module, record


def restore_encoder(path: Path) -> tuple[Encoder, dict[str, Any]]:
    """The encoder and the record of a checkpoint of either phase; errors as of :func:`restore`."""
    checkpoint = read_checkpoint(path)
    record = checkpoint[RECORD]
    encoder = make_encoder(config_of(record["config"]).model, record["features"])
    load_part(encoder, checkpoint["state_dict"], "encoder", str(path))
    return encoder, record


def _record(kind: str, config: Config, splits: Splits, seen: Seen, freeze: bool = False) -> dict[str, Any]:
    return {
        "kind": kind,
        "config": asdict(config),
        "features": dict(splits.features),
        "standardiser": splits.standardiser.state_dict(),
        "label_range": splits.label_range,
        "freeze": freeze,
        "data": splits.fingerprint,
        "seen": seen._asdict(),
    }


def _test(module: nn.Module, splits: Splits, folder: Path) -> Mapping[str, float] | None:
    if len(splits.test) == 0:
        return None
    predictions = predict(module, splits.test)
    write_predictions(folder / PREDICTIONS, splits.test, predictions)
    return measure(predictions, splits.test.labels, splits.label_range)
