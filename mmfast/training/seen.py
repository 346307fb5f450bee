"""What a network has seen, by which it is told whether samples can test it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.data import MultimodalDataset
from mmfast.training.splits import Splits

NONE = torch.empty(0, dtype=torch.int64, device="cpu")


class Overlap(NamedTuple):
    """Numbers of samples that were seen; each counts once, for the closest use."""

    labels: int
    selection: int
    inputs: int

    def __str__(self) -> str:
        uses = ("trained on", "used to choose the epoch", "seen by pre-training, without labels")
        return ", ".join(f"{count} {use}" for count, use in zip(self, uses, strict=True) if count)


class Seen(NamedTuple):
    """Fingerprints of samples by what they were used for, so that no name, path, format or copy hides them.

    See :meth:`~mmfast.data.MultimodalDataset.fingerprints`: values that were changed or rounded are other samples.

    Attributes:
        labels: those whose labels the network was trained on.
        selection: those whose loss chose the epoch.
        inputs: those that pre-training saw, without labels.
    """

    labels: Tensor = NONE
    selection: Tensor = NONE
    inputs: Tensor = NONE

    @classmethod
    def by(
        cls, splits: Splits, labels: bool, monitored: bool, before: Mapping[str, Any] | None = None
    ) -> Seen:
        """What a stage's network has seen.

        Args:
            labels: the stage is trained on labelled samples.
            monitored: its epoch is chosen by validation samples.
            before: ``seen`` of the record of the checkpoint that it starts from.
        """
        known = cls() if before is None else cls(**before)
        trained, used = (splits.train, known.labels) if labels else (splits.inputs, known.inputs)
        trained = torch.cat([used, trained.fingerprints()])
        chosen = torch.cat([known.selection, splits.valid.fingerprints()]) if monitored else known.selection
        return known._replace(selection=chosen, **{"labels" if labels else "inputs": trained})

    def mask(self, dataset: MultimodalDataset) -> Tensor:
        """(N,) bool: samples that were seen in any way."""
        return dataset.among(torch.cat(self))

    def overlap(self, dataset: MultimodalDataset) -> Overlap:
        """How many of the samples were used for what."""
        new, counts = torch.ones(len(dataset), dtype=torch.bool, device="cpu"), []
        for fingerprints in self:
            used = dataset.among(fingerprints) & new
            new &= ~used
            counts.append(int(used.sum()))
        return Overlap(*counts)
