"""TAILOR's aligned MOSEI with emotions, a torch file: kniter1/TAILOR `src/dataloaders/cmu_dataloader.py`.

SPLIT/src-text, src-audio, src-visual    (N, 60, F) arrays or tensors, or lists of N arrays (60, F)
SPLIT/tgt                                N lists of tokens: 2 at the beginning, 3 at the end, between them 4 happy,
                                         5 sad, 6 anger, 7 surprise, 8 disgust, 9 fear, or none
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmfast.data.corpus import MultimodalData
from mmfast.data.options import Options
from mmfast.data.readers import padded
from mmfast.data.readers.format import Format
from mmfast.data.readers.padding import Cut, unpad
from mmfast.data.readers.parts import Part, assemble
from mmfast.data.source import Source
from mmfast.data.targets import MULTILABEL
from mmfast.errors import UserError

EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")
BEGIN, END, FIRST = 2, 3, 4
MOST_TOKENS = 1_000


def recognises(source: Source) -> bool:
    return padded.holds(source, lambda keys: "tgt" in keys and any(_is_feature(key) for key in keys))


def _is_feature(key: Any) -> bool:
    return isinstance(key, str) and key.startswith("src-")


def read(source: Source, options: Options) -> MultimodalData:
    """All splits; multilabel. Steps that are zero in all modalities at both ends are cut.

    Raises:
        UserError: arrays that do not fit together, or tokens that are none of these.
    """
    path, content = source.path, source.object()
    found = {}
    for split, (key, entry) in padded.by_split(path, padded.splits_of(content)).items():
        found[split] = padded.arrays(path, key, {k: v for k, v in entry.items() if _is_feature(k)})
    aligned = all(len({a.shape[1] for a in arrays.values()}) == 1 for arrays, _ in found.values())
    rows = {
        s: (len(next(iter(arrays.values()))), next(iter(keys.values())))
        for s, (arrays, keys) in found.items()
    }
    labels, parts, cut = emotions(source, rows), {}, Cut()
    for split, (arrays, _) in found.items():
        values, lengths, here = unpad(arrays, aligned)
        cut += here
        parts[split] = Part(values, labels[split], lengths=lengths)
    return assemble(
        path,
        parts,
        layout=f"TAILOR file, {'aligned' if aligned else 'not aligned'}",
        padding=str(cut),
        task=MULTILABEL,
        targets=EMOTIONS,
        warnings=padded.left_out(content),
    )


def emotions(source: Source, rows: Mapping[str, tuple[int, str]]) -> dict[str, np.ndarray]:
    """Split -> (N, 6) of 0 and 1.

    Args:
        rows: split -> N, and what has N rows, for errors.

    Raises:
        UserError: no file with emotions, another number of them, tokens that are none.
    """
    path = source.path
    content = source.object() if source.kind in ("pickle", "torch") else None
    splits = padded.by_split(path, padded.splits_of(content))
    found = {}
    for split, (samples, like) in rows.items():
        key, entry = splits.get(split, (split, {}))
        if "tgt" not in entry:
            raise UserError(f"{path}: {key} must hold tgt, the emotions of its samples, got none")
        tokens = padded.plain(f"{path}: {key}.tgt", entry["tgt"])
        is_list = isinstance(tokens, (list, tuple)) or (isinstance(tokens, np.ndarray) and tokens.ndim)
        if not is_list:
            raise UserError(
                f"{path}: {key}.tgt must be a list of tokens a sample, got {type(tokens).__name__}"
            )
        if len(tokens) != samples:
            raise UserError(f"{path}: {key}.tgt must have {samples} rows as {like}, got {len(tokens)}")
        found[split] = np.zeros((samples, len(EMOTIONS)), np.float32)
        for i, item in enumerate(tokens):
            found[split][i, _columns(path, f"{key}.tgt[{i}]", item)] = 1
    return found


def _columns(path: Path, where: str, tokens: Any) -> list[int]:
    tokens = padded.plain(f"{path}: {where}", tokens)
    if isinstance(tokens, np.ndarray):
        tokens = tokens.reshape(-1)[: MOST_TOKENS + 1].tolist()
    if not isinstance(tokens, (list, tuple)) or not 2 <= len(tokens) <= MOST_TOKENS:
        raise UserError(
            f"{path}: {where} must be a list of tokens from {BEGIN} to {END}, got {_shown(tokens)}"
        )
    tokens = [t.item() if isinstance(t, np.generic) or getattr(t, "ndim", None) == 0 else t for t in tokens]
    ends = tokens[0], tokens[-1]
    if not all(isinstance(token, (int, float)) for token in ends) or ends != (BEGIN, END):
        raise UserError(f"{path}: {where} must begin with {BEGIN} and end with {END}, got {_shown(tokens)}")
    for token in tokens[1:-1]:
        if not isinstance(token, (int, float)) or token not in range(FIRST, FIRST + len(EMOTIONS)):
            last = FIRST + len(EMOTIONS) - 1
            raise UserError(f"{path}: {where} must hold {FIRST} to {last} inside, got {_shown(token)}")
    return [int(token) - FIRST for token in tokens[1:-1]]


def _shown(value: Any) -> str:
    """The first items of a list, of which those that are lists have no end in some files."""
    if isinstance(value, (list, tuple)):
        items = ["[...]" if isinstance(item, (list, tuple)) else _shown(item) for item in value[:6]]
        return f"[{', '.join(items)}{', ...' if len(value) > 6 else ''}]"
    return repr(value)[:20] if isinstance(value, (int, float, str)) else type(value).__name__


FORMAT = Format("a TAILOR file (src-text, src-audio, src-visual, tgt)", recognises, read, padded.contents)
