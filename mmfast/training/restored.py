"""A trained network beside samples to ask it about, and which of them it has seen."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mmfast.data import MultimodalData, MultimodalDataset, Standardiser
from mmfast.errors import UserError
from mmfast.tasks import Task
from mmfast.training import runs
from mmfast.training.config import SPLITS
from mmfast.training.data_config import DataConfig, place
from mmfast.training.encoder import check_takes
from mmfast.training.model_section import encoder_class
from mmfast.training.module import StageModule
from mmfast.training.parsing import config_of
from mmfast.training.seen import Seen
from mmfast.training.splits import load_data, load_other, select


class Samples(NamedTuple):
    """What :func:`samples` finds.

    Attributes:
        dataset: the chosen samples, standardised as those that the network was trained on.
        seen: the samples that it has seen.
        own: whether the data are those of its run, under whatever path, so that splits and folds are the run's.
    """

    dataset: MultimodalDataset
    seen: Seen
    own: bool


class Restored(NamedTuple):
    """What :func:`restore` finds: the network with its task, and :class:`Samples` that fit it."""

    module: StageModule
    dataset: MultimodalDataset
    seen: Seen
    own: bool


def restore(checkpoint: str, path: str | None, split: str) -> Restored:
    """The network of a checkpoint and the samples of a split.

    Args:
        checkpoint: of a supervised run.
        path: of the data; those of the run if None.
        split: one of :func:`~mmfast.training.splits.named_parts`, ``all`` of them, or those of them that the network
            has not ``unseen``.

    Raises:
        UserError: not such a checkpoint, no such data, other features or targets; without ``path``, data that are no
            longer those of the run.
    """
    module, record = runs.restore(Path(checkpoint))
    found = samples(checkpoint, record, path, split)
    return Restored(module, *found._replace(dataset=_with_targets(checkpoint, found.dataset, module.task)))


def samples(checkpoint: str, record: Mapping[str, Any], path: str | None, split: str) -> Samples:
    """The samples of a split for a network whose checkpoint holds a ``record``; as :func:`restore`."""
    if split not in SPLITS:
        raise UserError(f"{checkpoint}: split must be one of {', '.join(SPLITS)}, got {split!r}")
    config = config_of(record["config"])
    data, own = _data(path, config.data, record["data"])
    if path is None and not own:
        raise UserError(
            f"{checkpoint}: the data at {place(config.data)} must be those it was trained on, with the fingerprint "
            f"{record['data']}, got {data.fingerprint()}; --data takes others"
        )
    seen = Seen(**record["seen"])
    dataset = select(data, "all" if split == "unseen" else split, config.data if own else None)
    if split == "unseen":
        dataset = dataset.subset(~seen.mask(dataset))
    wanted = record["features"]
    if dataset.features != wanted:
        raise UserError(
            f"{checkpoint}: was trained on the features {_sizes(wanted)}, the data have {_sizes(dataset.features)}"
        )
    check_takes(encoder_class(config.model.encoder), dataset)
    standardiser = Standardiser().load_state_dict(record["standardiser"])
    return Samples(standardiser.transform(dataset), seen, own)


def _with_targets(checkpoint: str, dataset: MultimodalDataset, task: Task) -> MultimodalDataset:
    """The data set with the targets of the network; its own may be others where none is labelled."""
    foreign = dataset.task != task.name or not set(dataset.targets) <= set(task.targets)
    if foreign and dataset.labelled().any():
        raise UserError(
            f"{checkpoint}: was trained on {task.name} of {', '.join(task.targets)}, the data have {dataset.task} of "
            f"{', '.join(dataset.targets)}"
        )
    return dataset.as_task(task.name, task.targets)


def _data(path: str | None, config: DataConfig, fingerprint: str) -> tuple[MultimodalData, bool]:
    """The data, and whether they are those that a run of ``config`` was trained on."""
    if path is None:
        data = load_data(config)
        return data, data.fingerprint() == fingerprint
    # The run may have divided them by itself, or made them, which other data may not allow.
    with contextlib.suppress(UserError):
        data = load_data(replace(config, path=path))
        if data.fingerprint() == fingerprint:
            return data, True
    return load_other(path, config), False


def _sizes(features: Mapping[str, int]) -> str:
    return ", ".join(f"{modality} {size}" for modality, size in features.items())
