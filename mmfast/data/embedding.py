"""Vectors for words: data that have text as words only get the modality `text` from a file of vectors.

The file is text as GloVe's: a line is a word, which may hold spaces, and F numbers; a first line of two whole numbers
(word2vec, fastText) is skipped. It is read line by line, and only the vectors that are needed are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmfast.data.corpus import SPLITS, MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.data.source import regular
from mmfast.errors import UserError

# What forced alignment writes where nobody speaks: no word, although files hold vectors of "sp".
PAUSE = "sp"
LONGEST_LINE = 1 << 20


def embed(data: MultimodalData, path) -> MultimodalData:
    """The same data with `text` made of its words, a step each; a word without a vector, or a pause, is 0.

    Raises:
        UserError: data without words, or with text already; see :func:`vectors`.
    """
    splits = {name: getattr(data, name) for name in (*SPLITS, "cross_validation")}
    given = {id(d): d for d in splits.values() if d is not None}
    spoken = Counter(word for d in given.values() for words in d.words or () for word in words)
    if "text" in data.modalities:
        raise UserError(
            f"embedding: {path} must be for text that comes as words only, got vectors in {data.name}"
        )
    if not spoken:
        raise UserError(
            f"embedding: {path} must be for text that comes as words only, got none in {data.name}"
        )
    found, features = vectors(Path(path), spoken.keys() - {PAUSE})
    if not found:
        raise UserError(
            f"{path}: must have a vector of one of the {len(spoken)} words of {data.name}, got none"
        )
    index = {word: i for i, word in enumerate(found, 1)}
    table = np.stack([np.zeros(features, np.float32), *found.values()])
    made = {key: _with_text(dataset, index, table) for key, dataset in given.items()}
    unknown = sorted((w for w in spoken if w not in found and w != PAUSE), key=lambda w: (-spoken[w], w))
    warnings = list(data.warnings)
    if unknown:
        steps = sum(spoken[word] for word in unknown)
        warnings.append(
            f"{len(unknown)} of {len(spoken)} words ({steps} steps) have no vector in {Path(path).name} and are 0, "
            f"such as {', '.join(word[:20] for word in unknown[:3])}"
        )
    return replace(
        data, warnings=tuple(warnings), **{n: made[id(d)] for n, d in splits.items() if d is not None}
    )


def _with_text(dataset: MultimodalDataset, index: dict[str, int], table: np.ndarray) -> MultimodalDataset:
    words = dataset.words or [[]] * len(dataset)
    rows = np.fromiter((index.get(word, 0) for sample in words for word in sample), np.int64)
    values = {m: dataset.flat(m) for m in dataset.modalities} | {"text": table[rows]}
    lengths = {m: dataset.lengths(m) for m in dataset.modalities}
    lengths["text"] = np.array([len(sample) for sample in words], np.int64)
    beside = {"words": dataset.words, "transcripts": dataset.transcripts, "tokens": dataset.tokens}
    return MultimodalDataset.from_flat(
        values, lengths, dataset.labels, dataset.ids, dataset.names, dataset.groups, **beside
    )


def vectors(path: Path, words: Collection[str]) -> tuple[dict[str, np.ndarray], int]:
    """word -> (F,) float32 of those `words` that the file has, the first of each, and F.

    Raises:
        UserError: no file of vectors, or a damaged line; names the line.
    """
    wanted = {word.encode("utf-8", "surrogatepass"): word for word in words}
    starts = {word.split(maxsplit=1)[0] for word in wanted if word.strip()}
    found: dict[str, np.ndarray] = {}
    features = 0
    for number, line in _lines(path):
        if not features:
            if number == 1 and _is_header(line):
                continue
            features = _features(path, number, line)
        # Of most lines nothing is needed but that they are whole.
        if line.count(b" ") == features and line[: line.index(b" ")] not in starts:
            continue
        name, *numbers = line.rsplit(None, features)
        if len(numbers) < features or _is_wider(name, wanted):
            raise _error(path, number, f"{features} numbers as the first line", f"{len(line.split()) - 1}")
        if (word := wanted.get(name)) is not None and word not in found:
            bad = next((field for field in numbers if not _is_number(field)), None)
            if bad is not None:
                raise _error(path, number, "numbers", _shown(bad))
            found[word] = np.array([float(field) for field in numbers], np.float64)
    if not features:
        raise UserError(f"{path}: vectors must be lines of a word and its numbers, got an empty file")
    return {word: vector.astype(np.float32) for word, vector in found.items()}, features


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without spaces around it) of the lines that are not empty."""
    with regular(path).open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE:
                raise _error(path, number, f"at most {LONGEST_LINE:,} bytes", "more")
            if line := line.strip():
                yield number, line


def _is_header(line: bytes) -> bool:
    fields = line.split()
    return len(fields) == 2 and all(field.isdigit() for field in fields)


def _features(path: Path, number: int, line: bytes) -> int:
    """How many numbers end a line, the first field being a word whatever it is."""
    fields = line.split()[1:]
    count = next((i for i, field in enumerate(reversed(fields)) if not _is_number(field)), len(fields))
    if not count:
        raise _error(path, number, "numbers", _shown(fields[-1] if fields else line))
    return count


def _is_wider(name: bytes, wanted: Collection[bytes]) -> bool:
    """Whether what should be a word ends in a number that is one too many."""
    return name not in wanted and len(parts := name.split()) > 1 and _is_number(parts[-1])


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return b"_" not in field


def _shown(field: bytes) -> str:
    return repr(field[:20].decode("utf-8", "replace"))


def _error(path: Path, number: int, rule: str, got: str) -> UserError:
    return UserError(f"{path}: line {number} must be a word and {rule}, got {got}")
