"""A trained network beside samples to ask it about, and which of them it has seen."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mmfast.data import MultimodalData, MultimodalDataset, load
from mmfast.errors import UserError
from mmfast.training import runs
from mmfast.training.config import DataConfig
from mmfast.training.seen import Seen
from mmfast.training.splits import check_aligned, load_data, select
from mmfast.training.supervised import Supervised


class Restored(NamedTuple):
    """What :func:`restore` finds.

    Attributes:
        module: the network.
        dataset: the chosen samples, standardised as those that it was trained on.
        label_range: of the labels that it was trained on.
        seen: the samples that it has seen.
        own: whether the data are those of its run, under whatever path, so that splits and folds are the run's.
    """

    module: Supervised
    dataset: MultimodalDataset
    label_range: tuple[float, float]
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
        UserError: not such a checkpoint, no such data, other features; without ``path``, data that are no longer
            those of the run.
    """
    module, config, standardiser, record = runs.restore(Path(checkpoint))
    data, own = _data(path, config.data, record["data"])
    if path is None and not own:
        raise UserError(
            f"{checkpoint}: the data at {config.data.path} must be those it was trained on, with the fingerprint "
            f"{record['data']}, got {data.fingerprint()}; --data takes others"
        )
    seen = Seen(**record["seen"])
    dataset = select(data, "all" if split == "unseen" else split, config.data if own else None)
    if split == "unseen":
        dataset = dataset.subset(~seen.mask(dataset))
    wanted = module.encoder.features
    if dataset.features != wanted:
        raise UserError(
            f"{checkpoint}: was trained on the features {_sizes(wanted)}, the data have {_sizes(dataset.features)}"
        )
    check_aligned(dataset)
    return Restored(module, standardiser.transform(dataset), record["label_range"], seen, own)


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
    return load(path), False


def _sizes(features: Mapping[str, int]) -> str:
    return ", ".join(f"{modality} {size}" for modality, size in features.items())
