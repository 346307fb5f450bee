"""The package's own file, written as a stream: what is in memory at a time are a few samples."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfast.data import fingerprint
from mmfast.data.corpus import MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.data.mapped import plan
from mmfast.data.readers import npz
from mmfast.data.readers.own import SPLITS, VERSION
from mmfast.data.targets import CLASSIFICATION, NONE
from mmfast.errors import UserError

VALUES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Keys of a split that no modality can have.
TAKEN = ("labels", "ids", "fingerprints", "names", "groups", "transcripts", "words", "tokens")
INDEX = torch.int64


class DataWriter:
    """Writes data of any size to a file, samples one after another.

    What is known of the samples beside their values comes first: `data` as it will be read, whose values may be yet
    to come (`planned`). Then each split's values are added in the order of its samples:

        with DataWriter("big.mmfast", MultimodalData(train=planned)) as writer:
            for values in stream:  # modality -> (n, F)
                writer.add("train", values)

    The file appears under its name when the `with` block has ended and all values are there; an older one stays until
    then, and an error leaves nothing behind.

    Args:
        data: splits that are the same data set are written once.
        dtype: of the values in the file, "float32", "float16" or "bfloat16"; they are read as float32.

    Raises:
        UserError: no samples, names that cannot be written, a path that cannot be, another dtype; from `add` values
            of other shapes than planned, or beyond the dtype; at the end, too few of them.
    """

    def __init__(self, path: str | os.PathLike, data: MultimodalData, dtype: str = "float32"):
        if dtype not in VALUES:
            raise UserError(f"save: dtype must be one of {', '.join(VALUES)}, got {dtype!r}")
        self._dtype = VALUES[dtype]
        self._path = Path(path)
        self._partial = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        self._splits, self._same = _own_splits(data)
        for dataset in self._splits.values():
            _check_names(dataset)
        self._known = {
            key: tensor for split, d in self._splits.items() for key, tensor in _beside(split, d, data.task)
        }
        tensors = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in self._known.items()}
        for split, dataset in self._splits.items():
            tensors[f"{split}/fingerprints"] = INDEX, (len(dataset),)
            for modality, features in dataset.features.items():
                steps = int(dataset.lengths(modality).sum())
                tensors[f"{split}/{modality}/values"] = self._dtype, (steps, features)
        metadata = {"format": VERSION, "data": json.dumps(_description(data, self._splits, self._same))}
        self._start, self._entries = plan(tensors, metadata)
        self._samples = dict.fromkeys(self._splits, 0)
        self._steps = {split: dict.fromkeys(d.modalities, 0) for split, d in self._splits.items()}

    def __enter__(self) -> DataWriter:
        with self._saving():
            self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            self._begin()
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self._check_complete()
                with self._saving():
                    os.fsync(self._file)
                    os.replace(self._partial, self._path)
        finally:
            os.close(self._file)
            self._partial.unlink(missing_ok=True)

    def _begin(self) -> None:
        end = max(entry.start + entry.size for entry in self._entries.values())
        with self._saving():
            # A full disk is told before anything is computed.
            os.posix_fallocate(self._file, 0, end)
            self._write(self._start, 0)
            for key, tensor in self._known.items():
                self._write(_bytes(tensor), self._entries[key].start)

    def add(self, split: str, values: Mapping[str, Tensor]) -> None:
        """Append the next sample of a split: modality -> (n, F), n as planned."""
        self.add_samples(split, values, self._samples[split] + 1)

    def add_samples(self, split: str, values: Mapping[str, Tensor], stop: int) -> None:
        """Append the samples of a split up to number `stop`: modality -> (sum of their n, F)."""
        dataset, first = self._splits[split], self._samples[split]
        lengths, read = {}, {}
        for modality, features in dataset.features.items():
            lengths[modality] = count = dataset.lengths(modality)[first:stop]
            steps = torch.as_tensor(values[modality], device="cpu")
            if steps.shape != (int(count.sum()), features) or not steps.is_floating_point():
                raise UserError(
                    f"DataWriter: {modality} of {split}[{first}:{stop}] must be ({int(count.sum())}, {features}) "
                    f"floating point, got {tuple(steps.shape)} {steps.dtype}"
                )
            rounded = steps.to(torch.float32).to(self._dtype)
            read[modality] = rounded.to(torch.float32), count.cumsum(0) - count
            if self._dtype != torch.float32 and (lost := rounded.isinf() & steps.isfinite()).any():
                raise UserError(
                    f"save: {modality} must be within {torch.finfo(self._dtype).max:g} in "
                    f"{str(self._dtype).removeprefix('torch.')}, got {float(steps[lost][0]):g}"
                )
            entry, done = self._entries[f"{split}/{modality}/values"], self._steps[split]
            with self._saving():
                self._write(_bytes(rounded), entry.start + done[modality] * features * self._dtype.itemsize)
            done[modality] += len(steps)
        with self._saving():
            place = self._entries[f"{split}/fingerprints"].start + first * INDEX.itemsize
            self._write(_bytes(fingerprint.of_samples(read, lengths)), place)
        self._samples[split] = stop

    def _check_complete(self) -> None:
        for split, dataset in self._splits.items():
            if self._samples[split] != len(dataset):
                raise UserError(
                    f"DataWriter: {split} must get its {len(dataset)} samples, got {self._samples[split]}"
                )

    def _write(self, data: memoryview | bytes, place: int) -> None:
        data = memoryview(data)
        while len(data):
            written = os.pwrite(self._file, data, place)
            data, place = data[written:], place + written

    def _saving(self) -> _Saving:
        return _Saving(self._path)


class _Saving:
    """What the system refuses becomes the sentence of `save`."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, _) -> None:
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise UserError(f"save: {self._path} cannot be written ({reason})") from None


def planned(features: Mapping[str, int], lengths: Mapping[str, Any], **beside: Any) -> MultimodalDataset:
    """Samples of modality -> F features and modality -> (N,) lengths whose values a `DataWriter` is to get.

    Args:
        beside: what `MultimodalDataset` is told of them: labels, ids, names, groups, ...
    """
    values = {
        m: torch.empty(int(torch.as_tensor(lengths[m], device="cpu").sum()), f, device="meta")
        for m, f in features.items()
    }
    return MultimodalDataset.from_flat(values, lengths, **beside)


def save(
    data: MultimodalData | MultimodalDataset,
    path: str | os.PathLike,
    dtype: str = "float32",
    sort: str | None = None,
) -> None:
    """Write all splits (or one data set, as `test`) to the package's own file, or to a .npz file by this name.

    The file appears under its name only when it is complete; an older one stays until then.

    Args:
        dtype: of the values in the file, "float32", "float16" or "bfloat16".
        sort: "length" lets samples of similar length lie together, as they are read; None keeps the order.

    Raises:
        UserError: no samples, names or values that cannot be written, a path that cannot be, a full disk, or what a
            .npz file has no place for.
    """
    if isinstance(data, MultimodalDataset):
        data = MultimodalData(test=data)
    if sort not in (None, "length"):
        raise UserError(f"save: sort must be length, or none, got {sort!r}")
    data = data if sort is None else _sorted(data)
    if Path(path).suffix == ".npz":
        if dtype != "float32":
            raise UserError(f"save: dtype must be float32 for a .npz file, got {dtype}")
        return npz.write(data, path)
    with DataWriter(path, data, dtype) as writer:
        for split, dataset in _own_splits(data)[0].items():
            for part in dataset.chunks():
                some = dataset.subset(part.numpy())
                values = {m: some.flat(m) for m in some.modalities}
                writer.add_samples(split, values, int(part[-1]) + 1)


def _sorted(data: MultimodalData) -> MultimodalData:
    done: dict[int, MultimodalDataset] = {}
    for split in SPLITS:
        if (d := getattr(data, split)) is not None and id(d) not in done:
            done[id(d)] = d.subset(torch.argsort(d.longest(), stable=True).numpy())
    return replace(data, **{s: done.get(id(getattr(data, s))) for s in SPLITS})


def _own_splits(data: MultimodalData) -> tuple[dict[str, MultimodalDataset], dict[str, str]]:
    """The splits that are to be written, and those that are another one: split -> the other."""
    own, same = {}, {}
    for split in SPLITS:
        dataset = getattr(data, split)
        if dataset is None or not len(dataset):
            continue
        other = next((name for name, known in own.items() if known is dataset), None)
        if other is None:
            own[split] = dataset
        else:
            same[split] = other
    if not own:
        raise UserError("save: data must hold at least one sample, got none")
    return own, same


def _check_names(dataset: MultimodalDataset) -> None:
    for modality, features in dataset.features.items():
        if "/" in modality or not modality.isprintable() or modality in TAKEN:
            raise UserError(
                f"save: a modality must be named without / and control characters, and not {', '.join(TAKEN)}, "
                f"got {modality!r}"
            )
        if features < 1:
            raise UserError(f"save: {modality} must have features, got none")


def _description(
    data: MultimodalData, splits: Mapping[str, MultimodalDataset], same: Mapping[str, str]
) -> dict[str, Any]:
    def of(dataset: MultimodalDataset) -> dict[str, Any]:
        modalities = {
            m: {"features": f, "steps": int(dataset.lengths(m).sum())} for m, f in dataset.features.items()
        }
        return {
            "samples": len(dataset),
            "modalities": modalities,
            "groups": list(dataset._groups),
            "beside": list(dataset._beside),
        }

    return {
        "name": data.name,
        "task": data.task,
        "targets": list(data.targets),
        "label_range": None if data.label_range is None else list(data.label_range),
        "sample_rate": data.sample_rate,
        "protocol": None if data.protocol is None else data.protocol.words(),
        "layout": data.layout,
        "padding": data.padding,
        "warnings": list(data.warnings),
        "splits": {split: of(dataset) for split, dataset in splits.items()} | dict(same),
    }


def _beside(split: str, dataset: MultimodalDataset, task: str) -> Iterator[tuple[str, Tensor]]:
    """Key -> tensor of all that is not values."""
    labels = dataset.labels
    yield f"{split}/labels", labels.nan_to_num(nan=NONE).to(INDEX) if task == CLASSIFICATION else labels
    yield f"{split}/ids", dataset.ids
    for modality in dataset.modalities:
        yield f"{split}/{modality}/offsets", _offsets(dataset.lengths(modality))
    groups = {f"groups/{kind}": names for kind, names in dataset._groups.items()}
    for kind, said in {"names": dataset._names, **groups, **dataset._beside}.items():
        yield from ((f"{split}/{kind}/{part}", tensor) for part, tensor in said.tensors().items())


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
