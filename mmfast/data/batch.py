"""A padded batch of several modalities, and how samples become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.data.flat import spans
from mmfast.errors import UserError

MODALITIES = ("text", "audio", "visual")
PADDINGS = ("back", "front")


def canonical(names) -> tuple[str, ...]:
    """Modality names in the order text, audio, visual, then all others as given."""
    names = tuple(names)
    return tuple(m for m in MODALITIES if m in names) + tuple(m for m in names if m not in MODALITIES)


class Packing(NamedTuple):
    """How rows of different lengths are walked through together, step by step, without a padded cell.

    All on the host: who launches work for step t has to know how much there is.

    Attributes:
        order: (B,) int64, the rows from the longest to the shortest, equal ones as they stand.
        places: (B,) int64, where each row stands in `order`: `x[order][places]` is `x`.
        alive: (longest,) int64, how many rows have a step t; they are the first ones of `order`.
    """

    order: Tensor
    places: Tensor
    alive: Tensor


class Lengths(dict[str, Tensor]):
    """Modality -> (B,) int64 on any device, and the same on the host; nothing waits for a GPU to ask for them.

    Attributes:
        host: modality -> (B,) on the host.
    """

    def __init__(self, lengths: Mapping[str, Tensor], host: Mapping[str, Tensor] | None = None):
        super().__init__(lengths)
        self._host = host
        self._packings: dict[str, Packing] = {}

    @property
    def host(self) -> Mapping[str, Tensor]:
        return {m: v.cpu() for m, v in self.items()} if self._host is None else self._host

    def to(self, function: Callable[[Tensor], Tensor]) -> Lengths:
        """The same elsewhere: `function` moves a tensor."""
        return Lengths({m: function(v) for m, v in self.items()}, self.host)

    def packing(self, modality: str) -> Packing:
        """The order by length, computed when it is first asked for."""
        if modality not in self._packings:
            self._packings[modality] = _packing(self.host[modality])
        return self._packings[modality]


def _packing(lengths: Tensor) -> Packing:
    order = torch.argsort(lengths, descending=True, stable=True)
    # How many rows end before step t, over all t.
    ended = torch.bincount(lengths, minlength=1).cumsum(0)[:-1]
    return Packing(order, torch.argsort(order), len(lengths) - ended)


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
        lengths: modality -> (B,) int64, the number of real steps, 0 where the modality is missing; kept as `Lengths`,
            which are known on the host wherever the batch is.
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
        if not isinstance(self.lengths, Lengths):
            self.lengths = Lengths(self.lengths)
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
            lengths=self.lengths.to(function),
            labels=None if self.labels is None else function(self.labels),
            ids=function(self.ids),
        )


class Selection(Sequence[Sample]):
    """Samples of a data set that are to be a batch: `collate` makes it of all at once, without a look at each."""

    def __init__(self, dataset, indices: Sequence[int]):
        self._dataset, self._indices = dataset, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index):
        chosen = self._indices[index]
        return Selection(self._dataset, chosen) if isinstance(index, slice) else self._dataset[chosen]

    def batch(self, padding: str) -> MultimodalBatch:
        return self._dataset.batch(self._indices, padding)


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
    if isinstance(samples, Selection):
        return samples.batch(padding)
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


def padded(steps: Tensor, counts: Tensor, padding: str) -> Tensor:
    """(B, longest, F) from the steps of all samples (sum of counts, F), and counts (B,)."""
    longest = int(counts.max()) if len(counts) else 0
    out = torch.zeros(len(counts), longest, steps.shape[1], device="cpu")
    starts = torch.arange(len(counts), device="cpu") * longest
    starts = starts + (longest - counts) if padding == "front" else starts
    out.flatten(0, 1).index_copy_(0, spans(starts, counts), steps)
    return out


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
