"""A padded batch of several modalities, and how samples become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.errors import UserError

MODALITIES = ("text", "audio", "visual")
PADDINGS = ("back", "front")


def canonical(names) -> tuple[str, ...]:
    """Modality names in the order text, audio, visual, then all others as given."""
    names = tuple(names)
    return tuple(m for m in MODALITIES if m in names) + tuple(m for m in names if m not in MODALITIES)


class Sample(NamedTuple):
    """One utterance, unpadded.

    Attributes:
        values: modality -> float32 (n, F); n may differ between modalities, 0 means that it is missing.
        label: a number or index of a class, NaN if there is none; (K,) float32 numbers or labels where there are K.
        id: stable number of the sample, the key of its random draws.
        name: what its source calls it.
    """

    values: dict[str, Tensor]
    label: float | Tensor
    id: int
    name: str


@dataclass
class MultimodalBatch:
    """B samples, each modality padded on its own.

    Attributes:
        values: modality -> (B, L_m, F_m) float32, 0 at padded steps; L_m is the modality's longest here.
        lengths: modality -> (B,) int64, the number of real steps, 0 where the modality is missing.
        labels: (B,) or (B, K) float32, NaN for none (see `MultimodalDataset`), or None where labels play no part.
        ids: (B,) int64, stable sample ids.
        padding: side of the padded steps, "back" or "front".
        filler: no sample of its step, see :func:`stand_in`.

    Raises:
        UserError: shapes that do not belong together.
    """

    values: dict[str, Tensor]
    lengths: dict[str, Tensor]
    labels: Tensor | None
    ids: Tensor
    padding: str = "back"
    filler: bool = False

    def __post_init__(self) -> None:
        _check_padding("MultimodalBatch", self.padding)
        if self.values.keys() != self.lengths.keys():
            raise UserError(
                "MultimodalBatch: lengths must name the modalities of values "
                f"{list(self.values)}, got {list(self.lengths)}"
            )
        size = len(self)
        for modality, value in self.values.items():
            if value.ndim != 3 or len(value) != size:
                raise UserError(
                    f"MultimodalBatch: values[{modality!r}] must be (B, L, F) with B = {size} as ids, "
                    f"got {tuple(value.shape)}"
                )
        vectors = {f"lengths[{m!r}]": v for m, v in self.lengths.items()}
        if self.labels is not None:
            # One row of K is as good as one number a sample.
            vectors["labels"] = self.labels[:, 0] if self.labels.ndim == 2 else self.labels
        for name, vector in vectors.items():
            if vector.shape != (size,):
                raise UserError(
                    f"MultimodalBatch: {name} must be ({size},) as ids, got shape {tuple(vector.shape)}"
                )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def samples(self) -> int:
        """How many of its rows are samples of the step: all, or none of a filler."""
        return 0 if self.filler else len(self)

    @property
    def modalities(self) -> tuple[str, ...]:
        return canonical(self.values)

    def to(self, device, non_blocking: bool = False) -> MultimodalBatch:
        """The batch on `device`."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MultimodalBatch:
        """The batch in page-locked memory, which copies to a GPU without blocking."""
        return self._map(Tensor.pin_memory)

    def _map(self, function) -> MultimodalBatch:
        return replace(
            self,
            values={m: function(v) for m, v in self.values.items()},
            lengths={m: function(v) for m, v in self.lengths.items()},
            labels=None if self.labels is None else function(self.labels),
            ids=function(self.ids),
        )


def collate(samples: Sequence[Sample], padding: str = "back") -> MultimodalBatch:
    """Pad every modality to its longest sample among `samples`.

    Args:
        samples: at least one, all with the same modalities and feature sizes.
        padding: "back" puts the real steps first, "front" puts them last.

    Raises:
        UserError: no samples, an unknown padding, or samples that do not fit together.
    """
    _check_padding("collate", padding)
    if len(samples) == 0:
        raise UserError("collate: a batch needs at least one sample, got none")
    modalities = canonical(samples[0].values)
    for sample in samples:
        if sample.values.keys() != samples[0].values.keys():
            raise UserError(
                f"collate: every sample must have the modalities {list(modalities)} of the first, "
                f"got {list(sample.values)} in sample {sample.name!r} (id {sample.id})"
            )
    values, lengths = {}, {}
    for modality in modalities:
        steps = [sample.values[modality] for sample in samples]
        lengths[modality] = torch.tensor([len(s) for s in steps], dtype=torch.int64, device="cpu")
        for sample, step in zip(samples, steps, strict=True):
            if step.shape[1] != steps[0].shape[1]:
                raise UserError(
                    f"collate: {modality} must have {steps[0].shape[1]} features as the first sample, got "
                    f"{step.shape[1]} in sample {sample.name!r} (id {sample.id})"
                )
        values[modality] = _pad(steps, padding)
    labels = [sample.label for sample in samples]
    if isinstance(labels[0], Tensor):
        labels = torch.stack(labels)
    else:
        labels = torch.tensor(labels, dtype=torch.float32, device="cpu")
    ids = torch.tensor([sample.id for sample in samples], dtype=torch.int64, device="cpu")
    return MultimodalBatch(values, lengths, labels, ids, padding)


def stand_in(sample: Sample, padding: str = "back") -> MultimodalBatch:
    """A batch for a process that has no sample in a step of several: its rows, without labels, count for nothing."""
    batch = collate([sample], padding)
    return replace(batch, labels=torch.full_like(batch.labels, torch.nan), filler=True)


def _pad(steps: list[Tensor], padding: str) -> Tensor:
    longest, features = max(len(s) for s in steps), steps[0].shape[1]
    out = torch.zeros(len(steps), longest, features, device="cpu")
    for row, real in zip(out, steps, strict=True):
        start = longest - len(real) if padding == "front" else 0
        row[start : start + len(real)] = real
    return out


def _check_padding(operation: str, padding: str) -> None:
    if padding not in PADDINGS:
        raise UserError(f'{operation}: padding must be "back" or "front", got {padding!r}')
