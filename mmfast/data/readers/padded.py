"""What MulT, MMSA and TAILOR have in common: a dict of splits, each a dict of padded arrays and lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfast.data.readers.format import Contents
from mmfast.data.readers.labels import of_list, read_labels
from mmfast.data.readers.parts import MODALITY_NAMES, SPLIT_NAMES
from mmfast.data.source import Source
from mmfast.errors import UserError

# Arrays that stand several times in a list may be few in the file and too many in memory.
REPEATED = 64 << 20
LONGEST_NAME, LONGEST_TEXT = 1_000, 100_000
MOST_KEYS = 200


def splits_of(content: Any) -> dict[str, dict]:
    """Their name of a split -> its dict, of the keys that name splits; {} if there are none."""
    if not isinstance(content, dict):
        return {}
    return {
        k: v for k, v in content.items() if isinstance(k, str) and k in SPLIT_NAMES and isinstance(v, dict)
    }


def holds(source: Source, wanted) -> bool:
    """Whether the source is a pickle or torch file of splits, the first of which has keys as `wanted` says."""
    if source.kind not in ("pickle", "torch"):
        return False
    try:
        splits = splits_of(source.object())
    except UserError:
        return False
    return any(wanted(entry.keys()) for entry in splits.values())


def by_split(path: Path, splits: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Our name of a split -> theirs and what it holds.

    Raises:
        UserError: two that are one split of ours.
    """
    found: dict[str, tuple[str, Any]] = {}
    for key, entry in splits.items():
        ours = SPLIT_NAMES[key]
        if ours in found:
            raise UserError(f"{path}: must hold one split {ours}, got {found[ours][0]} and {key}")
        found[ours] = key, entry
    return found


def left_out(content: Mapping, known=("config",)) -> list[str]:
    """A warning of what stands beside the splits and is not read."""
    rest = [str(key)[:40] for key in content if key not in known and key not in splits_of(content)]
    return [f"{len(rest)} keys are no split and not read, such as {rest[0]}"] if rest else []


def contents(source: Source) -> Contents:
    """(split and key, shape, dtype) of what the splits hold."""
    rows = []
    for split, entry in splits_of(source.object()).items():
        for key, value in list(entry.items())[:MOST_KEYS]:
            rows.append(listed(f"{split}.{str(key)[:40]}", value))
    return rows


def listed(key: str, value: Any) -> tuple[str, tuple[int, ...], str]:
    """(key, shape, dtype), of a list its length and type."""
    size = (len(value),) if isinstance(value, (list, tuple)) else ()
    dtype = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
    return key, tuple(getattr(value, "shape", size)), dtype


def arrays(path: Path, split: str, entry: Mapping) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Modality (our name) -> (N, L, F) numbers, one N for all; and modality -> their key.

    Raises:
        UserError: other shapes, no numbers, other N, one modality twice.
    """
    found: dict[str, np.ndarray] = {}
    keys: dict[str, str] = {}
    for key, value in entry.items():
        if not isinstance(key, str) or key not in MODALITY_NAMES or value is None:
            continue
        ours = MODALITY_NAMES[key]
        if ours in found:
            raise UserError(f"{path}: {split} must hold {ours} once, got {keys[ours]} and {key}")
        found[ours], keys[ours] = _array(f"{path}: {split}.{key}", value), key
        first = next(iter(found))
        _rows(f"{path}: {split}.{key}", len(found[ours]), len(found[first]), keys[first])
    if not found:
        raise UserError(f"{path}: {split} must hold text, audio or vision, got {few(entry)}")
    return found, keys


def few(entry: Mapping) -> str:
    """The first keys of a dict."""
    return ", ".join(str(key)[:40] for key in list(entry)[:6]) or "nothing"


def _rows(where: str, got: int, wanted: int, as_what: str) -> None:
    if got != wanted:
        raise UserError(f"{where} must have {wanted} rows as {as_what}, got {got}")


def _array(where: str, value: Any) -> np.ndarray:
    if isinstance(value, (list, tuple)):
        value = _stacked(where, value)
    value = plain(where, value)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        raise UserError(f"{where} must hold numbers, got {kind(value)}")
    if value.ndim != 3:
        raise UserError(f"{where} must be (N, L, F), got {value.shape}")
    if 0 in value.shape[1:]:
        raise UserError(f"{where} must have steps and features, got {value.shape}")
    return value


def _stacked(where: str, items) -> np.ndarray:
    """A list of N arrays (L, F) as (N, L, F)."""
    items = [plain(f"{where}[{i}]", item) for i, item in enumerate(items)]
    if not items:
        raise UserError(f"{where} must hold arrays, got an empty list")
    for i, item in enumerate(items):
        if not isinstance(item, np.ndarray) or item.dtype.kind not in "biuf":
            raise UserError(f"{where}[{i}] must be an array of numbers, got {kind(item)}")
        if item.ndim != 2 or item.shape != items[0].shape:
            raise UserError(f"{where}[{i}] must be (L, F) as the first, {items[0].shape}, got {item.shape}")
    own = sum(item.nbytes for item in {id(item): item for item in items}.values())
    if items[0].nbytes * len(items) > 2 * own + REPEATED:
        raise UserError(
            f"{where} must hold an array of its own for each sample, got {len(items)} times a few"
        )
    return np.stack(items)


def plain(where: str, value: Any) -> Any:
    """A tensor as an array, anything else as it is.

    Raises:
        UserError: a tensor that is more than what is stored of it, or sparse, or quantised.
    """
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise UserError(f"{where} must be a plain tensor, got {value.layout} of {value.dtype}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(f"{where} must be stored whole, got {tuple(value.shape)} of fewer numbers")
    return (value.float() if value.dtype == torch.bfloat16 else value.resolve_neg().resolve_conj()).numpy()


def kind(value: Any) -> str:
    """What a value is, in a word or two."""
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


def labels_of(
    path: Path, given: Mapping[str, tuple[str, Any]], rows: Mapping[str, tuple[int, str]]
) -> tuple[dict[str, np.ndarray], str]:
    """Split -> its labels, and their task, which is that of all splits together.

    Args:
        given: split -> key and labels as the file has them.
        rows: split -> N, and the key of what has N rows.

    Raises:
        UserError: no numbers, another number of rows, other shapes in different splits.
    """
    parts = {
        split: label_array(f"{path}: {key}", value, *rows[split]) for split, (key, value) in given.items()
    }
    first = next(iter(parts), None)
    plainer = {split: _squeezed(part) for split, part in parts.items()}
    for split, part in parts.items():
        if plainer[split].shape[1:] != plainer[first].shape[1:]:
            shape = ", ".join(["N", *map(str, parts[first].shape[1:])]) + (
                "," if parts[first].ndim == 1 else ""
            )
            raise UserError(
                f"{path}: {given[split][0]} must be ({shape}) as {given[first][0]}, got {part.shape}"
            )
    joint = read_labels(
        f"{path}: {given[first][0]}", np.concatenate(list(plainer.values())), sum(map(len, parts.values()))
    )
    return apart(joint.values, parts), joint.task


def apart(joint: np.ndarray, parts: Mapping[str, Sequence]) -> dict[str, np.ndarray]:
    """Split -> its rows of what was joined, in the order and of the sizes of `parts`."""
    ends = np.cumsum([len(part) for part in parts.values()])[:-1]
    return dict(zip(parts, np.split(joint, ends), strict=True))


def _squeezed(array: np.ndarray) -> np.ndarray:
    """(N, ...) without the axes of 1 behind the first: whether a number a sample stands in (N,) or (N, 1, 1)."""
    return array.reshape(len(array), *(n for n in array.shape[1:] if n != 1))


def label_array(where: str, value: Any, samples: int, like: str) -> np.ndarray:
    """Labels (N, ...) of any kind of number, from an array, a tensor, or a list of numbers or of small arrays."""
    value = plain(where, value)
    if isinstance(value, (list, tuple)):
        _rows(where, len(value), samples, like)
        value = of_list(where, [plain(where, item) for item in value])
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        raise UserError(f"{where} must be numbers, got {kind(value)}")
    if value.ndim == 0 or 0 in value.shape[1:]:
        raise UserError(f"{where} must be (N,), (N, 1), (N, 1, 1) or (N, K), got {value.shape}")
    _rows(where, len(value), samples, like)
    return value


def text(item: Any) -> str | None:
    """A string of any kind, bytes as UTF-8 or else Latin-1, a number as it is written; None for anything else."""
    if isinstance(item, bytes):
        try:
            return item.decode()
        except UnicodeDecodeError:
            return item.decode("latin1")
    if isinstance(item, str):
        return str(item).encode("utf-8", "replace").decode()
    return str(item) if isinstance(item, (int, float, np.number)) else None


def strings(where: str, value: Any, samples: int, like: str, longest: int = LONGEST_TEXT) -> list[str]:
    """N strings from a list or an array (N,) or (N, 1).

    Raises:
        UserError: another number, anything that is no string, a string of absurd length.
    """
    return [row[0] for row in _table(where, value, (samples, like), (1,), longest)]


def names(where: str, value: Any, samples: int, like: str) -> tuple[list[str], dict[str, list[str]]]:
    """A name per sample, and the videos where all ids tell them: VIDEO, START, END; VIDEO$_$CLIP; VIDEO[CLIP].

    Raises:
        UserError: as `strings`.
    """
    rows = _table(where, value, (samples, like), (1, 3), LONGEST_NAME)
    if rows and len(rows[0]) == 3:
        return [f"{video}[{start},{end}]" for video, start, end in rows], {"video": [row[0] for row in rows]}
    told = [row[0] for row in rows]
    for mark in ("$_$", "["):
        if told and all(mark in name for name in told):
            return told, {"video": [name.split(mark)[0] for name in told]}
    return told, {}


def _table(
    where: str, value: Any, rows: tuple[int, str], widths: tuple[int, ...], longest: int
) -> list[list[str]]:
    """N rows of as many strings as one of `widths`, the same in all."""
    is_array = isinstance(value, np.ndarray)
    if not (is_array and 1 <= value.ndim <= 2) and not isinstance(value, (list, tuple)):
        raise UserError(f"{where} must be a list of text, got {value.shape if is_array else kind(value)}")
    _rows(where, len(value), *rows)
    table: list[list[str]] = []
    for i, item in enumerate(value):
        is_row = isinstance(item, (list, tuple)) or (isinstance(item, np.ndarray) and item.ndim == 1)
        cells = item if is_row else [item]
        if len(cells) not in widths or (table and len(cells) != len(table[0])):
            wanted = " or ".join(map(str, widths))
            raise UserError(f"{where}[{i}] must be {wanted} strings as in all others, got {len(cells)}")
        table.append([_cell(f"{where}[{i}]", cell, longest) for cell in cells])
    return table


def _cell(where: str, value: Any, longest: int) -> str:
    told = text(value)
    if told is None:
        raise UserError(f"{where} must be text, got {kind(value)}")
    if len(told) > longest:
        raise UserError(f"{where} must have at most {longest:,} characters, got {len(told):,}")
    return told
