"""mmfast's own file: safetensors (https://huggingface.co/docs/safetensors), whose values are mapped and never loaded.

`__metadata__` holds `format`, "mmfast-data 2", and `data`, JSON of what follows; the tensors of a split S are

    S/M/values         F32, F16 or BF16 (sum of lengths, F) of modality M: the steps of all samples, one after another
    S/M/offsets        I64 (N + 1): sample i has the steps from offsets[i] to offsets[i + 1]
    S/labels           F32 (N) or (N, K), NaN for none; I64 (N) of classes, -1 for none
    S/ids              I64 (N)
    S/fingerprints     I64 (N): see MultimodalDataset.fingerprints (optional, then computed)
    S/names            bytes U8, UTF-8, and offsets I64 (N + 1); the same of S/groups/KIND and of S/transcripts
    S/words            bytes and offsets of all words, and samples I64 (N + 1), the first word of each
    S/tokens           values I32, and offsets I64 (N + 1)

    data = {name, task, targets, label_range, sample_rate, layout, padding, warnings,
            splits: {S: {samples, modalities: {M: {features, steps}}, groups: [KIND], beside: [words, ...]}}}

S is train, valid, test, unlabelled or cross_validation; one that is the same as another names it instead.
"""

from __future__ import annotations

import codecs
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfast.data.arguments import BESIDE
from mmfast.data.corpus import MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.data.flat import Flat
from mmfast.data.mapped import CODES, LONGEST_HEADER, PREFIX, Mapped, MappedFile, parse_json, told
from mmfast.data.options import Options
from mmfast.data.ragged import ENCODING, Ragged, Strings
from mmfast.data.readers.format import Contents, Format
from mmfast.data.source import Source, regular
from mmfast.data.targets import TASKS
from mmfast.errors import UserError
from mmfast.split_spec import Protocol

VERSION = "mmfast-data 2"
SPLITS = ("train", "valid", "test", "unlabelled", "cross_validation")
FLOATING = (torch.float32, torch.float16, torch.bfloat16)
INDEX = (torch.int64,)
MOST_FEATURES = 1_000_000
# Bytes of text that are checked at a time.
TEXT = 1 << 20


def recognises(source: Source) -> bool:
    """Whether it is a safetensors file whose header says that it is of this format."""
    if source.kind != "safetensors":
        return False
    try:
        with regular(source.path).open("rb") as file:
            start = file.read(PREFIX + LONGEST_HEADER)
    except (OSError, UserError):
        return False
    return b"mmfast-data" in start[: PREFIX + int.from_bytes(start[:PREFIX], "little")]


def read(source: Source, options: Options | None = None) -> MultimodalData:
    """The data of a file, whose values stay there until they are asked for.

    Raises:
        UserError: a damaged or foreign file.
    """
    file = _Opened(regular(source.path))
    described = file.described["splits"]
    if not isinstance(described, dict) or not described:
        raise file.wrong("data.splits", "describe at least one split", described)
    splits: dict[str, MultimodalDataset] = {}
    for split, content in described.items():
        if split not in SPLITS:
            raise file.wrong("data.splits", f"be among {', '.join(SPLITS)}", split)
        if isinstance(content, str):
            if content not in splits:
                raise file.wrong(f"data.splits.{split}", "name a split before it", content)
            splits[split] = splits[content]
        else:
            splits[split] = file.split(split, content)
    if unknown := file.entries.keys() - file.used:
        raise file.wrong("keys", "be those of the splits that data describe", sorted(unknown)[0])
    try:
        return MultimodalData(**splits, **file.corpus())
    except (ValueError, TypeError) as error:
        raise UserError(f"{file.path}: {error}") from None


def contents(source: Source) -> Contents:
    """(key, shape, dtype) of every tensor."""
    entries = MappedFile(regular(source.path)).entries
    return [(key, entry.shape, CODES[entry.dtype]) for key, entry in entries.items()]


def verify(path) -> None:
    """Read all values and compare their fingerprints with those in the file; what is in memory are a few samples.

    Raises:
        UserError: values that are not those that were written.
    """
    data = read(Source(path))
    for split in SPLITS:
        if (dataset := getattr(data, split)) is not None:
            other = (
                torch.nonzero(dataset.computed_fingerprints() != dataset.fingerprints()).flatten().tolist()
            )
            if other:
                raise UserError(
                    f"{path}: {split} must have the values that its fingerprints were made of, got others in "
                    f"{len(other)} samples, first {dataset.names[other[0]]!r}"
                )


FORMAT = Format("an mmfast data file", recognises, read, contents)


class _Opened(MappedFile):
    """The file with what its JSON says, and which of its tensors have been asked for."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.used: set[str] = set()
        if (found := self.metadata.get("format")) != VERSION:
            raise self.wrong("format", f"be {VERSION!r}", found)
        self.described = parse_json(self.path, "data", self.metadata.get("data", "null"))
        wanted = {"name", "task", "targets", "label_range", "splits"}
        if missing := wanted - self.described.keys():
            raise self.wrong("data", f"have {', '.join(sorted(missing))}", list(self.described))

    def wrong(self, key: str, rule: str, value: Any) -> UserError:
        return UserError(f"{self.path}: {key} must {rule}, got {told(value)}")

    def corpus(self) -> dict[str, Any]:
        """What data say of all splits, as `MultimodalData` takes it."""

        def texts(value: Any) -> bool:
            return isinstance(value, list) and all(isinstance(item, str) for item in value)

        def is_range(value: Any) -> bool:
            numbers = isinstance(value, list) and all(type(n) in (int, float) for n in value)
            return numbers and len(value) == 2 and all(abs(n) <= 1e300 for n in value)

        rules = {
            "name": ("be a text", lambda v: isinstance(v, str), None),
            "task": (f"be one of {', '.join(TASKS)}", lambda v: v in TASKS, None),
            "targets": ("be a list of texts", texts, None),
            "label_range": ("be two numbers or null", lambda v: v is None or is_range(v), None),
            "sample_rate": ("be a rate or null", lambda v: v is None or (type(v) is int and v > 0), None),
            "layout": ("be a text", lambda v: isinstance(v, str), ""),
            "padding": ("be a text", lambda v: isinstance(v, str), "none"),
            "warnings": ("be a list of texts", texts, []),
        }
        found = {}
        for key, (rule, fits, default) in rules.items():
            found[key] = self.described.get(key, default)
            if not fits(found[key]):
                raise self.wrong(f"data.{key}", rule, found[key])
        return found | {"protocol": self._protocol(self.described.get("protocol"))}

    def _protocol(self, words: Any) -> Protocol | None:
        try:
            return None if words is None else Protocol.of_words(words if isinstance(words, list) else [words])
        except UserError:
            raise self.wrong(
                "data.protocol", "be kfold:K or a group, a seed, and a group or null", words
            ) from None

    def split(self, split: str, content: Any) -> MultimodalDataset:
        where = f"data.splits.{split}"
        if not isinstance(content, dict) or not {"samples", "modalities"} <= content.keys():
            raise self.wrong(where, "have samples and modalities, or name another split", content)
        size = self._whole(f"{where}.samples", content["samples"], 1)
        modalities = content["modalities"]
        if not isinstance(modalities, dict) or not modalities:
            raise self.wrong(f"{where}.modalities", "describe at least one modality", modalities)
        kinds = {"groups": content.get("groups", []), "beside": content.get("beside", [])}
        for kind, names in kinds.items():
            if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
                raise self.wrong(f"{where}.{kind}", "be a list of names", names)
        if foreign := set(kinds["beside"]) - BESIDE.keys():
            raise self.wrong(f"{where}.beside", f"be among {', '.join(BESIDE)}", sorted(foreign)[0])
        ids = self._of(f"{split}/ids", INDEX, (size,)).tensor
        values, lengths = {}, {}
        for modality, about in modalities.items():
            if not isinstance(about, dict) or not {"features", "steps"} <= about.keys():
                raise self.wrong(f"{where}.modalities.{modality}", "have features and steps", about)
            features = self._whole(f"{where} features", about["features"], 1, MOST_FEATURES)
            steps = self._whole(f"{where} steps", about["steps"], 0)
            key = f"{split}/{modality}"
            values[modality] = Flat.of(self._of(f"{key}/values", FLOATING, (steps, features)))
            offsets = self._offsets(f"{key}/offsets", steps, size)
            lengths[modality] = offsets[1:] - offsets[:-1]
        try:
            dataset = MultimodalDataset.from_flat(
                values,
                lengths,
                self._labels(f"{split}/labels", size),
                ids,
                self._ragged(f"{split}/names", Strings, size),
                {kind: self._ragged(f"{split}/groups/{kind}", Strings, size) for kind in kinds["groups"]},
                **{kind: self._ragged(f"{split}/{kind}", BESIDE[kind], size) for kind in kinds["beside"]},
            )
        except (ValueError, TypeError) as error:
            message = str(error)
            raise UserError(
                message if message.startswith(str(self.path)) else f"{self.path}: {split}: {message}"
            ) from None
        key = f"{split}/fingerprints"
        if key not in self.entries:
            return dataset
        return dataset.with_fingerprints(self._of(key, INDEX, (size,)).tensor)

    def _labels(self, key: str, size: int) -> Tensor:
        classes = self.described["task"] == "classification"
        shape = self.entries[key].shape if key in self.entries else ()
        wide = len(shape) == 2 and shape[1] > 0 and not classes
        return self._of(key, INDEX if classes else FLOATING[:1], (size, shape[1]) if wide else (size,)).tensor

    def _ragged(self, key: str, kind: type[Ragged], size: int) -> Ragged:
        """Texts, words or tokens of all samples; every offset and every letter is one."""
        if kind is BESIDE["tokens"]:
            values = self._of(f"{key}/values", (torch.int32,), None)
            self._offsets(f"{key}/offsets", len(values.tensor), size)
            parts = ("values", "offsets")
        else:
            text = self._of(f"{key}/bytes", (torch.uint8,), None)
            words = kind is BESIDE["words"]
            offsets = self._offsets(f"{key}/offsets", len(text.tensor), None if words else size)
            self._check_text(f"{key}/bytes", text.tensor, offsets)
            if words:
                self._offsets(f"{key}/samples", len(offsets) - 1, size)
            parts = ("bytes", "offsets", "samples") if words else ("bytes", "offsets")
        return kind.from_tensors({part: Mapped(self, f"{key}/{part}") for part in parts})

    def _check_text(self, key: str, text: Tensor, offsets: Tensor) -> None:
        decoder = codecs.getincrementaldecoder(ENCODING["encoding"])(ENCODING["errors"])
        try:
            for part in text.split(TEXT) if len(text) else ():
                decoder.decode(part.numpy().tobytes())
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise self.wrong(key, "be UTF-8", error.reason) from None
        inner = offsets[offsets < len(text)]
        if ((text[inner] & 0xC0) == 0x80).any():
            raise self.wrong(key, "be divided between letters", "an offset within one")

    def _offsets(self, key: str, end: int, size: int | None) -> Tensor:
        offsets = self._of(key, INDEX, None if size is None else (size + 1,)).tensor
        falls = torch.nonzero(offsets[1:] < offsets[:-1]).flatten()
        ends = offsets[[0, -1]].tolist() if len(offsets) else []
        if ends != [0, end] or len(falls):
            got = f"{int(offsets[falls[0] + 1])} after {int(offsets[falls[0]])}" if len(falls) else ends
            raise self.wrong(key, f"rise from 0 to {end}", got)
        return offsets

    def _of(self, key: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None) -> Mapped:
        """A tensor of one of these types and of this shape, or of one dimension."""
        if key not in self.entries:
            raise self.wrong("keys", f"have {key}", list(self.entries))
        entry = self.entries[key]
        if entry.dtype not in dtypes or (len(entry.shape) != 1 if shape is None else entry.shape != shape):
            kinds = " or ".join(CODES[dtype] for dtype in dtypes)
            told_shape = "(n,)" if shape is None else str(shape)
            raise self.wrong(key, f"be {kinds} of shape {told_shape}", f"{CODES[entry.dtype]} {entry.shape}")
        self.used.add(key)
        return Mapped(self, key)

    def _whole(self, key: str, value: Any, least: int, most: float = math.inf) -> int:
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(
                key, f"be a whole number from {least}" + f" to {most}" * (most < math.inf), value
            )
        return value
