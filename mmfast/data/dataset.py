"""Utterances in memory: one data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmfast.data import arguments, fingerprint, joined, targets
from mmfast.data.batch import PADDINGS, MultimodalBatch, Sample, Selection, canonical, padded
from mmfast.data.flat import Flat, chunks, spans
from mmfast.data.ragged import Strings
from mmfast.errors import UserError


class MultimodalDataset(Dataset):
    """Unpadded feature sequences of several modalities, held in memory.

    All steps of a modality lie in one (steps, F) tensor; a sample is a slice of it, and subsets share it.

    Args:
        values: modality -> one (n, F) array or tensor per sample; n may be 0 (missing). Kept as float32. NaN
            and inf are legal (`Standardiser` repairs them); float64 beyond float32's range becomes inf.
        labels: (N,) numbers; (N,) classes by name or index; or (N, K) numbers or labels of 0 and 1. NaN, None or ""
            where there is none, -1 for classes and labels; default none at all. Names say that they are classes; what
            numbers are, `MultimodalData` is told.
        ids: one unique int64 per sample; default 0, 1, 2, ...
        names: one string per sample; default the ids.
        groups: kind of group, such as "speaker", "session" or "video", -> one string per sample; default none. One
            plain sequence of strings is the kind "group". `divide` and `folds` keep the samples of a group
            together, lest a network be tested on somebody that it was trained on.
        words: one list of strings per sample, a word a step; default none.
        transcripts: one string per sample; default none.
        tokens: one array of token ids per sample, with a length of its own; default none.

    Raises:
        UserError: sizes that do not fit together, infinite labels, names of classes among numbers, repeated ids.
    """

    def __init__(
        self,
        values: Mapping[str, Sequence],
        labels=None,
        ids=None,
        names: Sequence[str] | None = None,
        groups: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
        words: Sequence[Sequence[str]] | None = None,
        transcripts: Sequence[str] | None = None,
        tokens: Sequence | None = None,
    ) -> None:
        flat, lengths = {}, {}
        for modality, samples in values.items():
            where = [f"values[{modality!r}][{i}]{arguments.named(names, i)}" for i in range(len(samples))]
            arrays = [arguments.float32(s, name, 2) for s, name in zip(samples, where, strict=True)]
            if not arrays:
                raise UserError(
                    f"MultimodalDataset: values[{modality!r}] must hold at least one sample, got none; "
                    "use MultimodalDataset.empty for an empty data set"
                )
            for name, array in zip(where, arrays, strict=True):
                if array.shape[1] != arrays[0].shape[1]:
                    raise UserError(
                        f"MultimodalDataset: {name} must have {arrays[0].shape[1]} features as the first sample, "
                        f"got {array.shape[1]}"
                    )
            flat[modality] = torch.cat(arrays)
            lengths[modality] = [len(a) for a in arrays]
        beside = {"words": words, "transcripts": transcripts, "tokens": tokens}
        self._set(flat, lengths, labels, ids, names, groups, beside)

    @classmethod
    def from_flat(
        cls,
        values: Mapping[str, Tensor],
        lengths,
        labels=None,
        ids=None,
        names=None,
        groups=None,
        **beside,
    ):
        """From modality -> (sum of lengths, F) of all samples' steps, and modality -> (N,) lengths.

        What is said of the samples ``beside`` is words, transcripts and tokens.
        """
        self = cls.__new__(cls)
        values = {
            m: v if isinstance(v, Flat) else arguments.float32(v, f"values[{m!r}]", 2)
            for m, v in values.items()
        }
        self._set(values, lengths, labels, ids, names, groups, beside)
        return self

    @classmethod
    def from_padded(
        cls,
        values: Mapping[str, Tensor],
        lengths,
        padding="back",
        labels=None,
        ids=None,
        names=None,
        groups=None,
    ):
        """From modality -> (N, L, F), padded "back" or "front", and modality -> (N,) lengths up to L."""
        if padding not in PADDINGS:
            raise UserError(f'MultimodalDataset: padding must be "back" or "front", got {padding!r}')
        flat, counts = {}, {}
        for modality, value in values.items():
            value = arguments.float32(value, f"values[{modality!r}]", 3)
            n, steps = value.shape[:2]
            counts[modality] = count = arguments.lengths(lengths, modality, n)
            if n and count.max() > steps:
                i = int(count.argmax())
                raise UserError(
                    f"MultimodalDataset: lengths[{modality!r}][{i}]{arguments.named(names, i)} must be at most "
                    f"the {steps} steps of its values, got {int(count[i])}"
                )
            position = torch.arange(steps, device="cpu")
            real = position < count[:, None] if padding == "back" else position >= steps - count[:, None]
            flat[modality] = value[real]
        return cls.from_flat(flat, counts, labels, ids, names, groups)

    @classmethod
    def empty(cls, features: Mapping[str, int]):
        """No samples, with the given feature sizes."""
        return cls.from_flat(
            {m: torch.empty(0, f, device="cpu") for m, f in features.items()}, {m: [] for m in features}
        )

    @classmethod
    def concatenate(cls, datasets: Sequence[MultimodalDataset]):
        """All samples of several data sets with the same features; ids must stay unique."""
        first = datasets[0]
        for other in datasets[1:]:
            if other.features != first.features:
                raise UserError(
                    f"MultimodalDataset.concatenate: features must be {first.features} as in the first, "
                    f"got {other.features}"
                )
        lengths = {m: torch.cat([d.lengths(m) for d in datasets]) for m in first.modalities}
        out = cls.from_flat(
            {m: torch.empty(int(n.sum()), first.features[m], device="meta") for m, n in lengths.items()},
            lengths,
            None,
            torch.cat([d.ids for d in datasets]),
            Strings.concatenate([d._names for d in datasets]),
            joined.groups(datasets),
            **joined.beside(datasets),
        )
        for m in first.modalities:
            out._values[m], out._starts[m] = joined.values(datasets, m)
        if any(d._fingerprints is not None for d in datasets):
            out._fingerprints = torch.cat([d.fingerprints() for d in datasets])
        op = "MultimodalDataset.concatenate"
        out._task, out._targets = task, names = targets.common(op, datasets)
        if task is None:
            columns = max(d.labels.shape[1] for d in datasets if d.labels.ndim == 2)
            out._labels = torch.cat(
                [d.labels if d.labelled().any() else targets.nothing(len(d), columns) for d in datasets]
            )
        else:
            out._labels = torch.cat([targets.fitted(op, d, task, names) for d in datasets])
        return out

    def _set(self, values, lengths, labels, ids, names, groups, beside) -> None:
        if not values:
            raise UserError("MultimodalDataset: values must hold at least one modality, got none")
        self._values, self._starts, self._lengths = {}, {}, {}
        self._fingerprints = None
        size = None
        for modality in values:
            if not isinstance(modality, str) or not modality:
                raise UserError(f"MultimodalDataset: a modality must have a name, got {modality!r}")
        for modality in canonical(values):
            value = values[modality]
            count = arguments.lengths(lengths, modality, size)
            size = len(count)
            if int(count.sum()) != len(value):
                raise UserError(
                    f"MultimodalDataset: lengths[{modality!r}] must add up to the {len(value)} steps "
                    f"of its values, got {int(count.sum())}"
                )
            self._values[modality] = value if isinstance(value, Flat) else Flat.of(value)
            self._lengths[modality] = count
            self._starts[modality] = count.cumsum(0) - count
        self._labels, self._task, self._targets = targets.read(labels, size, names)
        self._ids = arguments.ids(ids, size)
        self._names = arguments.strings(self._ids.tolist() if names is None else names, "names", size)
        self._groups = arguments.groups(groups, size)
        self._beside = arguments.beside(beside, size)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def in_memory(self) -> bool:
        """Whether all values are in memory, and none in a file."""
        return all(flat.memory is not None for flat in self._values.values())

    def __getitem__(self, index: int) -> Sample:
        """One sample; its tensors are views of the data set's memory, or read from its file."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"MultimodalDataset: index must be below {len(self)}, got {index}")
        values = {}
        for modality, flat in self._values.items():
            start = int(self._starts[modality][index])
            values[modality] = flat.slice(start, start + int(self._lengths[modality][index]))
        label = self._labels[index]
        label = float(label) if label.ndim == 0 else label
        return Sample(values, label, int(self._ids[index]), str(self._names[index]))

    def __getitems__(self, indices: Sequence[int]) -> Selection:
        """Samples that are to be a batch: what a `DataLoader` hands to `collate`."""
        return Selection(self, indices)

    def batch(self, indices, padding: str = "back") -> MultimodalBatch:
        """The samples at `indices` as `collate` makes a batch of them, several times faster."""
        chosen = arguments.integers(indices, "indices", None)
        values, lengths = {}, {}
        for modality, flat in self._values.items():
            lengths[modality] = count = self._lengths[modality][chosen]
            steps = flat.take(spans(self._starts[modality][chosen], count))
            values[modality] = padded(steps, count, padding)
        return MultimodalBatch(values, lengths, self._labels[chosen], self._ids[chosen], padding)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self._values)

    @property
    def features(self) -> dict[str, int]:
        """Modality -> feature size F."""
        return {m: v.features for m, v in self._values.items()}

    @property
    def labels(self) -> Tensor:
        """(N,) numbers or indices of classes, or (N, K) numbers or labels of 0 and 1: float32, NaN for none."""
        return self._labels

    def labelled(self) -> Tensor:
        """(N,) bool: which samples have a label, or one at least of several."""
        known = ~self._labels.isnan()
        return known if known.ndim == 1 else known.any(1)

    @property
    def task(self) -> str | None:
        """regression, classification or multilabel; None for (N, K) labels of which nobody has said what they are."""
        return self._task

    @property
    def targets(self) -> tuple[str, ...] | None:
        """Names of the columns of the labels, or of the classes; None where `task` is."""
        return self._targets

    @property
    def ids(self) -> Tensor:
        """(N,) int64."""
        return self._ids

    @property
    def names(self) -> list[str]:
        return self._names.tolist()

    @property
    def groups(self) -> dict[str, list[str]]:
        """Kind of group -> what each sample's group of this kind is called; empty where there are no groups."""
        return {kind: names.tolist() for kind, names in self._groups.items()}

    @property
    def words(self) -> list[list[str]] | None:
        """The words of each sample, one a step of its aligned modalities, or None."""
        return self._listed("words")

    @property
    def transcripts(self) -> list[str] | None:
        """What is said in each sample, or None."""
        return self._listed("transcripts")

    @property
    def tokens(self) -> list[np.ndarray] | None:
        """int32 token ids of each sample, of a length of their own, or None."""
        return self._listed("tokens")

    def _listed(self, kind: str) -> list | None:
        return self._beside[kind].tolist() if kind in self._beside else None

    def lengths(self, modality: str) -> Tensor:
        """(N,) int64 real steps of one modality, 0 where it is missing."""
        if modality not in self._lengths:
            raise UserError(
                f"MultimodalDataset.lengths: modality must be one of {list(self._lengths)}, got {modality!r}"
            )
        return self._lengths[modality]

    def longest(self) -> Tensor:
        """(N,) int64: time steps of each sample's longest modality."""
        return torch.stack([self._lengths[m] for m in self.modalities]).amax(0)

    def unaligned(self) -> Tensor:
        """(N,) bool: which samples have modalities of different lengths, beside those that they lack."""
        lengths = torch.stack([self._lengths[m] for m in self.modalities])
        return ((lengths != 0) & (lengths != lengths.amax(0))).any(0)

    def without_steps(self) -> Tensor:
        """(N,) bool: which samples have no modality at all."""
        return self.longest() == 0

    def flat(self, modality: str) -> Tensor:
        """(sum of lengths, F): the steps of all samples, one after another; read-only by convention.

        Of data in a file all are read at once: `blocks` reads a few at a time.
        """
        return self._values[modality].gathered(self._starts[modality], self.lengths(modality))

    def blocks(self, modality: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The steps in the order of `flat`, a few thousand at a time: whose they are, (n,), and (n, F) float32."""
        return self._values[modality].blocks(self._starts[modality], self.lengths(modality))

    def subset(self, indices) -> MultimodalDataset:
        """The samples at `indices` (or of a boolean mask), in that order, sharing this data set's memory."""
        indices = np.asarray(indices)
        indices = (
            torch.from_numpy(indices)
            if indices.dtype == bool
            else arguments.integers(indices, "indices", None)
        )
        out = self._share()
        out._starts = {m: v[indices] for m, v in self._starts.items()}
        out._lengths = {m: v[indices] for m, v in self._lengths.items()}
        out._labels = self._labels[indices]
        out._ids = arguments.ids(self._ids[indices], None)
        out._names = self._names.take(indices)
        out._groups = {kind: names.take(indices) for kind, names in self._groups.items()}
        out._beside = {kind: items.take(indices) for kind, items in self._beside.items()}
        if self._fingerprints is not None:
            out._fingerprints = self._fingerprints[indices]
        return out

    def with_labels(self, labels) -> MultimodalDataset:
        """The same samples with other labels, of any kind that the constructor takes."""
        out = self._share()
        out._labels, out._task, out._targets = targets.read(labels, len(self), self._names)
        return out

    def keep_labels(self, mask: Tensor) -> MultimodalDataset:
        """The same samples, without the labels of those where the mask (N,) is False."""
        out = self._share()
        out._labels = self._labels.clone()
        out._labels[~mask] = torch.nan
        return out

    def as_task(self, task: str, names: Sequence[str]) -> MultimodalDataset:
        """The same samples with labels of a task and with these targets, names of columns or classes.

        Raises:
            UserError: labels that are none of the task, or other targets.
        """
        names = tuple(names)
        if (self._task, self._targets) == (task, names):
            return self
        labels = targets.fitted("MultimodalData", self, task, names)
        return self._share(_labels=labels, _task=task, _targets=names)

    def identified(self, ids, names: Sequence[str], groups) -> MultimodalDataset:
        """The same samples with other ids, names and groups."""
        out = self._share()
        out._ids = arguments.ids(ids, len(self))
        out._names = arguments.strings(names, "names", len(self))
        out._groups = arguments.groups(groups, len(self))
        return out

    def map(self, function: Callable[[str, Tensor], Tensor], by_step: bool = False) -> MultimodalDataset:
        """A new data set with `function(modality, steps (T, F))` in place of each modality's steps.

        Its samples keep the fingerprints of those they were made from.

        Args:
            by_step: what becomes of a step depends on this step alone. Data in a file stay there, and are changed
                as they are read; workers of a loader must be able to unpickle the function.
        """
        if by_step and not self.in_memory:
            return self._share(_values={m: flat.then(m, function) for m, flat in self._values.items()})
        out = self.with_values({m: function(m, self.flat(m)) for m in self.modalities}, self._lengths)
        out._fingerprints = self.fingerprints()
        return out

    def only(self, modalities: Sequence[str]) -> MultimodalDataset:
        """The same samples with these of their modalities."""
        fields = ("_values", "_starts", "_lengths")
        kept = {field: {m: getattr(self, field)[m] for m in modalities} for field in fields}
        return self._share(**kept, _fingerprints=None)

    def with_values(self, values: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> MultimodalDataset:
        """The same samples with other steps, modality -> (steps, F), and lengths, modality -> (N,).

        Other contents have other fingerprints. Words, one a step of text, are left out where text has other lengths.
        """
        flat = self.from_flat(values, lengths, None, self._ids)
        out = self._share()
        out._values, out._starts, out._lengths = flat._values, flat._starts, flat._lengths
        out._fingerprints = None
        if "text" in lengths and not torch.equal(out._lengths["text"], self.lengths("text")):
            out._beside = {kind: items for kind, items in self._beside.items() if kind != "words"}
        return out

    def fingerprints(self) -> Tensor:
        """(N,) int64: a hash of each sample's values as they were read, before any `map` (standardisation).

        Equal for equal float32 values, lengths and modalities, whatever the file, its format, the order of the
        samples, their ids, names and labels. 0 for a sample without any step. 64 bits of BLAKE2b: two different
        samples of 100,000 agree with probability 3e-10.
        """
        if self._fingerprints is None:
            self._fingerprints = self.computed_fingerprints()
        return self._fingerprints

    def with_fingerprints(self, fingerprints: Tensor) -> MultimodalDataset:
        """The same samples, whose `fingerprints` are known: those of a file, say."""
        return self._share(_fingerprints=fingerprints)

    def computed_fingerprints(self) -> Tensor:
        """(N,) int64: `fingerprints` of the values that the samples have now."""
        done = [torch.empty(0, dtype=torch.int64, device="cpu")]
        for part in self.chunks():
            lengths = {m: v[part] for m, v in self._lengths.items()}
            steps = {m: flat.samples(self._starts[m][part], lengths[m]) for m, flat in self._values.items()}
            done.append(fingerprint.of_samples(steps, lengths))
        return torch.cat(done)

    def chunks(self) -> Iterator[Tensor]:
        """Indices of all samples in their order, in runs whose values fit into memory together."""
        return chunks(sum(self._lengths[m] * features for m, features in self.features.items()))

    def among(self, fingerprints: Tensor) -> Tensor:
        """(N,) bool: which samples have one of these `fingerprints`; those without any step never do."""
        own = self.fingerprints()
        return torch.isin(own, fingerprints) & (own != 0)

    def fingerprint(self) -> str:
        """32 hexadecimal digits for all samples with their labels, whatever their order, ids and names."""
        return fingerprint.of_all(self.features, self.fingerprints(), self._labels)

    def _share(self, **changed) -> MultimodalDataset:
        out = self.__class__.__new__(self.__class__)
        out.__dict__.update(self.__dict__, **changed)
        return out
