"""Lists of texts, of words and of numbers by sample: of a million samples they open without a look at any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfast.data.flat import spans
from mmfast.data.mapped import Mapped

# Half of a surrogate pair, which names of files may hold, is no UTF-8.
ENCODING = {"encoding": "utf-8", "errors": "surrogatepass"}


class Ragged(Sequence):
    """N items, parts of one sequence of values: item i has the `counts[i]` values from `starts[i]` on.

    Items are made when they are asked for; `values` may lie in a file.
    """

    def __init__(self, values: Any, starts: Tensor, counts: Tensor):
        self._values, self.starts, self.counts = values, starts, counts

    @classmethod
    def within(cls, values: Any, offsets: Tensor) -> Ragged:
        """Items one after another, the i-th from offsets[i] to offsets[i + 1]."""
        return cls(values, offsets[:-1], offsets[1:] - offsets[:-1])

    @classmethod
    def none(cls, size: int) -> Ragged:
        """So many empty items."""
        nothing = torch.zeros(size, dtype=torch.int64, device="cpu")
        return cls(cls.of([]).values, nothing, nothing)

    @property
    def values(self) -> Any:
        return self._values.tensor if isinstance(self._values, Mapped) else self._values

    @property
    def offsets(self) -> Tensor:
        """(N + 1,) int64 of the `packed` values."""
        return torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])

    def packed(self) -> Any:
        """The values of all items, one after another."""
        in_order = torch.equal(self.counts.cumsum(0) - self.counts, self.starts)
        if in_order and len(self.values) == int(self.counts.sum()):
            return self.values
        return self._chosen(self.values, spans(self.starts, self.counts))

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it: part of the key -> tensor; `from_tensors` is the inverse."""
        raise NotImplementedError

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor | Mapped]) -> Ragged:
        raise NotImplementedError

    def take(self, indices: Tensor) -> Ragged:
        """The items at (n,) int64 or of a mask (N,) bool."""
        return type(self)(self._values, self.starts[indices], self.counts[indices])

    @classmethod
    def concatenate(cls, several: Sequence[Ragged]) -> Ragged:
        counts = torch.cat([one.counts for one in several])
        return cls(cls._joined([one.packed() for one in several]), counts.cumsum(0) - counts, counts)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}, got {index}")
        start = int(self.starts[index])
        return self._item(self.values, start, start + int(self.counts[index]))

    def __iter__(self):
        values, counts = self._values_for_all(), self.counts
        for start, stop in zip(self.starts.tolist(), (self.starts + counts).tolist(), strict=True):
            yield self._item(values, start, stop)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(_same(a, b) for a, b in zip(self, other, strict=True))

    __hash__ = None

    def tolist(self) -> list:
        return list(self)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3])) + (", ..." if len(self) > 3 else "")
        return f"{type(self).__name__}([{shown}])"

    def _values_for_all(self) -> Any:
        return self.values

    @staticmethod
    def _item(values: Any, start: int, stop: int) -> Any:
        raise NotImplementedError

    @staticmethod
    def _chosen(values: Tensor, indices: Tensor) -> Any:
        return values.index_select(0, indices)

    @staticmethod
    def _joined(parts: list) -> Any:
        return torch.cat(parts)


class Strings(Ragged):
    """A str an item; the values are the bytes of UTF-8."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        coded = [str(text).encode(**ENCODING) for text in texts]
        counts = torch.tensor([len(text) for text in coded], dtype=torch.int64, device="cpu")
        joined = np.frombuffer(bytearray(b"".join(coded)), np.uint8)
        return cls(torch.from_numpy(joined), counts.cumsum(0) - counts, counts)

    def tensors(self) -> dict[str, Tensor]:
        return {"bytes": self.packed(), "offsets": self.offsets}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor | Mapped]) -> Strings:
        return cls.within(tensors["bytes"], tensors["offsets"].tensor)

    def _values_for_all(self) -> memoryview:
        return memoryview(self.values.numpy())

    @staticmethod
    def _item(values: Tensor | memoryview, start: int, stop: int) -> str:
        part = values[start:stop]
        return str(part.numpy() if isinstance(part, Tensor) else part, **ENCODING)


class Words(Ragged):
    """A list of str an item; the values are `Strings`."""

    @classmethod
    def of(cls, lists: Iterable[Iterable[str]]) -> Words:
        lists = [list(words) for words in lists]
        counts = torch.tensor([len(words) for words in lists], dtype=torch.int64, device="cpu")
        return cls(Strings.of(word for words in lists for word in words), counts.cumsum(0) - counts, counts)

    def tensors(self) -> dict[str, Tensor]:
        return {**self.packed().tensors(), "samples": self.offsets}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor | Mapped]) -> Words:
        return cls.within(Strings.from_tensors(tensors), tensors["samples"].tensor)

    @staticmethod
    def _item(values: Strings, start: int, stop: int) -> list[str]:
        return values[start:stop]

    @staticmethod
    def _chosen(values: Strings, indices: Tensor) -> Strings:
        return values.take(indices)

    @staticmethod
    def _joined(parts: list[Strings]) -> Strings:
        return Strings.concatenate(parts)


class Tokens(Ragged):
    """An int32 array (n,) an item."""

    @classmethod
    def of(cls, arrays: Iterable) -> Tokens:
        arrays = [np.asarray(array, dtype=np.int32).reshape(-1) for array in arrays]
        counts = torch.tensor([len(array) for array in arrays], dtype=torch.int64, device="cpu")
        joined = np.concatenate([np.empty(0, np.int32), *arrays])
        return cls(torch.from_numpy(joined), counts.cumsum(0) - counts, counts)

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.packed(), "offsets": self.offsets}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor | Mapped]) -> Tokens:
        return cls.within(tensors["values"], tensors["offsets"].tensor)

    @staticmethod
    def _item(values: Tensor, start: int, stop: int) -> np.ndarray:
        return values[start:stop].numpy().copy()


def _same(a: Any, b: Any) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else a == b
