"""All steps of a modality, one after another, wherever they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.data.mapped import Mapped

# Rows per block: float64 copies of them stay in cache, which is twice as fast as 2^16 rows.
BLOCK = 1 << 13
Change = Callable[[str, Tensor], Tensor]


class Piece(NamedTuple):
    """Steps in one place, with what is done to them as they are read: row by row, so that any rows may be read.

    Attributes:
        source: (steps, F) float32 in memory, or mapped in any floating dtype.
        changes: (modality, function) in the order in which they are applied.
        features: F of the changed steps.
    """

    source: Tensor | Mapped
    changes: tuple[tuple[str, Change], ...]
    features: int

    @property
    def tensor(self) -> Tensor:
        return self.source.tensor if isinstance(self.source, Mapped) else self.source

    def read(self, rows: Tensor) -> Tensor:
        """Float32 from rows of `tensor`."""
        rows = rows.to(torch.float32)
        for modality, function in self.changes:
            rows = function(modality, rows)
        return rows


class Flat:
    """(steps, F) float32: a tensor, or steps in files, one after another, that are read when they are asked for."""

    def __init__(self, pieces: Sequence[Piece]):
        self.pieces = tuple(pieces)
        self._ends = torch.tensor([len(p.tensor) for p in self.pieces], device="cpu").cumsum(0)

    @classmethod
    def of(cls, source: Tensor | Mapped) -> Flat:
        return cls([Piece(source, (), source.shape[1])])

    @classmethod
    def concatenate(cls, flats: Sequence[Flat]) -> Flat:
        return cls([piece for flat in flats for piece in flat.pieces])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def features(self) -> int:
        return self.pieces[0].features

    @property
    def memory(self) -> Tensor | None:
        """The one tensor in memory that it is; None where steps are read from files or changed as they are read."""
        first = self.pieces[0]
        simple = len(self.pieces) == 1 and not first.changes and isinstance(first.source, Tensor)
        return first.source if simple else None

    def then(self, modality: str, change: Change) -> Flat:
        """The same steps, changed as they are read; a first one is tried now, for a change may refuse."""
        pieces = []
        for piece in self.pieces:
            changed = piece._replace(changes=(*piece.changes, (modality, change)))
            pieces.append(changed._replace(features=changed.read(piece.tensor[:1]).shape[1]))
        return Flat(pieces)

    def slice(self, start: int, stop: int) -> Tensor:
        """Steps that lie side by side; a view where they are in memory."""
        if (memory := self.memory) is not None:
            return memory[start:stop]
        if len(self.pieces) == 1:
            piece = self.pieces[0]
            # A copy: a view would drag its whole file along wherever it is sent.
            return piece.read(piece.tensor[start:stop].clone())
        return self.take(torch.arange(start, stop, device="cpu"))

    def take(self, rows: Tensor) -> Tensor:
        """Steps by their numbers (P,) int64: (P, F)."""
        if len(self.pieces) == 1:
            return self.pieces[0].read(self.pieces[0].tensor.index_select(0, rows))
        place = torch.searchsorted(self._ends, rows, right=True)
        out = torch.empty(len(rows), self.features, device="cpu")
        first = 0
        for number, (piece, end) in enumerate(zip(self.pieces, self._ends.tolist(), strict=True)):
            here = torch.nonzero(place == number).flatten()
            if len(here):
                out.index_copy_(0, here, piece.read(piece.tensor.index_select(0, rows[here] - first)))
            first = end
        return out

    def whole(self) -> Tensor:
        """All of it, in memory unless one file holds it just so."""
        read = [piece.read(piece.tensor) for piece in self.pieces]
        return torch.cat(read) if len(read) > 1 else read[0]

    def gathered(self, starts: Tensor, counts: Tensor) -> Tensor:
        """Steps of all samples, which lie in `starts` (N,) and have `counts` (N,), one sample after another."""
        if _in_order(starts, counts) and len(self) == int(counts.sum()):
            return self.whole()
        return self.take(spans(starts, counts))

    def blocks(self, starts: Tensor, counts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The same, `BLOCK` at a time: whose they are, (n,) int64, and (n, F) float32."""
        ends = counts.cumsum(0)
        in_order, shift = _in_order(starts, counts), starts - (ends - counts)
        total = int(counts.sum())
        for first in range(0, total, BLOCK):
            steps = torch.arange(first, min(first + BLOCK, total), device="cpu")
            sample = torch.searchsorted(ends, steps, right=True)
            if in_order:
                yield sample, self.slice(first, first + len(steps))
            else:
                yield sample, self.take(steps + shift[sample])

    def samples(self, starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Steps of samples that lie in `starts` (n,) and have `counts` (n,): a tensor, and where they start in it."""
        if (memory := self.memory) is not None:
            return memory, starts
        return self.take(spans(starts, counts)), counts.cumsum(0) - counts


def _in_order(starts: Tensor, counts: Tensor) -> bool:
    """Whether the steps of the samples follow each other from the first one on."""
    return torch.equal(counts.cumsum(0) - counts, starts)


def spans(starts: Tensor, counts: Tensor) -> Tensor:
    """The numbers starts[i], starts[i] + 1, ..., counts[i] of them, of all i one after another."""
    packed = counts.cumsum(0) - counts
    numbers = torch.repeat_interleave(starts - packed, counts)
    return numbers.add_(torch.arange(len(numbers), device="cpu"))


def chunks(cells: Tensor, limit: int = 1 << 23) -> Iterator[Tensor]:
    """The numbers 0, 1, ... of samples of so many `cells` (N,), in runs that fit into memory together."""
    run = cells.cumsum(0) // limit
    yield from torch.arange(len(cells), device="cpu").split(
        torch.unique_consecutive(run, return_counts=True)[1].tolist()
    )
