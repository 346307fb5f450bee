"""One computational sequence of CMU-MultimodalSDK: features of videos, and the seconds they were measured in."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmfast.data.readers.hdf5 import Array, Hdf5, open_hdf5
from mmfast.data.readers.intervals import last
from mmfast.errors import UserError

ROLES = {
    "labels": "label|opinion|emotion",
    "text": "glove|wordvec|word_vec|word vec|bert|embedding",
    "audio": "covarep|opensmile|mfcc|acoustic|audio",
    "visual": "facet|openface|visual|video",
}
NAMES, CORPUS = "dimension names", "dataset name"
SEGMENT = re.compile(r"(.*?)\[(\d+)\]")


@dataclass(frozen=True)
class Rows:
    """What one video has: (n, 2) seconds, (n, F) numbers or (n, 1) words."""

    intervals: np.ndarray
    features: np.ndarray
    keys: np.ndarray


@dataclass
class Sequence:
    """A file `ROOT/data/VIDEO/{features,intervals}`, `ROOT/metadata/KEY`, with as little read as tells what it is.

    Attributes:
        videos: id -> the groups of the file that are its, several where they are called VIDEO[k].
        metadata: of `NAMES` and `CORPUS`, what there is.
        skipped: rows whose interval ends no later than it starts, in what was read so far.
    """

    path: Path
    root: str
    arrays: dict[str, Array]
    videos: dict[str, list[str]]
    metadata: dict = field(default_factory=dict)
    skipped: int = 0

    @classmethod
    def find(cls, path: Path) -> Sequence | None:
        """The file's sequence, or None where it is of another layout.

        Raises:
            UserError: a damaged file, or one that leads elsewhere.
        """
        with open_hdf5(path) as file:
            if not (root := root_of(file)):
                return None
            arrays, videos = file.arrays(), {}
            for key in arrays:
                match key.split("/"):
                    case [_, "data", group, "features" | "intervals"]:
                        found = SEGMENT.fullmatch(group)
                        videos.setdefault(found[1] if found else group, {})[group] = (
                            int(found[2]) if found else -1
                        )
            ordered = {video: sorted(groups, key=groups.get) for video, groups in videos.items()}
            out = cls(path, root, arrays, ordered)
            for key in (NAMES, CORPUS):
                name = f"{root}/metadata/{key}"
                if name in arrays and arrays[name].is_text:
                    out.metadata[key] = _json("".join(file.read(name, arrays[name]).flat))
        for groups in ordered.values():
            for group in groups:
                for kind in ("features", "intervals"):
                    if f"{root}/data/{group}/{kind}" not in arrays:
                        raise UserError(f"{path}: {root}/data/{group} must hold {kind}, got none")
        return out

    @property
    def role(self) -> str | None:
        """words, labels, text, audio, visual, "" for what is no modality, None for what cannot be told."""
        name = self.root.lower()
        if "phone" in name:
            return ""
        if self.videos and self._first().is_text:
            return "words"
        return next((role for role, words in ROLES.items() if re.search(words, name)), None)

    def _first(self) -> Array:
        group = next(iter(self.videos.values()))[0]
        return self.arrays[f"{self.root}/data/{group}/features"]

    def rows(self) -> int:
        """Of all videos."""
        return sum(
            self.arrays[f"{self.root}/data/{g}/features"].shape[0]
            for groups in self.videos.values()
            for g in groups
            if self.arrays[f"{self.root}/data/{g}/features"].shape
        )

    def about(self) -> tuple[str, tuple[int, ...], str]:
        """(key, shape, dtype) for a listing, of all videos together."""
        key = f"{self.path.name}:{self.root}/data, {len(self.videos):,} videos"
        first = self._first() if self.videos else Array((0,), "nothing")
        return key, (self.rows(), *first.shape[1:]), first.dtype

    @contextlib.contextmanager
    def opened(self) -> Iterator[Hdf5]:
        """The file, with the data sets to be read from it."""
        with open_hdf5(self.path) as file:
            self.arrays = file.arrays()
            yield file

    def read(self, file: Hdf5, video: str, as_filed: bool = False) -> Rows:
        """The rows of one video in order of their start, or all as they are in the file.

        Raises:
            UserError: sizes that do not fit, intervals that are no numbers, features of another kind or width.
        """
        features, intervals, keys = [], [], []
        text, width = self._first().is_text, None
        for group in self.videos[video]:
            key = f"{self.root}/data/{group}"
            value, times = (
                file.read(f"{key}/{kind}", self.arrays[f"{key}/{kind}"]) for kind in ("features", "intervals")
            )
            where = f"{self.path}: {key}"
            if times.ndim != 2 or times.shape[1] != 2 or times.dtype.kind not in "iuf":
                raise UserError(
                    f"{where}/intervals must be (n, 2) seconds, got {times.shape} of {times.dtype}"
                )
            if value.ndim < 1 or len(value) != len(times):
                raise UserError(
                    f"{where}/features must have {len(times)} rows as its intervals, got {value.shape}"
                )
            if self.arrays[f"{key}/features"].is_text != text or value.dtype.kind not in "biufO":
                raise UserError(
                    f"{where}/features must be {'words' if text else 'numbers'} as in other videos"
                )
            times = times.astype(np.float64)
            if not np.isfinite(times).all():
                bad = int(np.flatnonzero(~np.isfinite(times).all(1))[0])
                raise UserError(f"{where}/intervals must be finite, got {times[bad].tolist()} in row {bad}")
            value = value.reshape(len(value), -1) if value.size else np.zeros((0, 1), value.dtype)
            if len(value) and width not in (None, value.shape[1]):
                raise UserError(f"{where}/features must have {width} columns, got {value.shape[1]}")
            width = value.shape[1] if len(value) else width
            features += [value] if len(value) else []
            intervals.append(times)
            one = len(times) == 1 and SEGMENT.fullmatch(group)
            keys += [group] if one else [""] * len(times)
        times = np.concatenate(intervals)
        value = np.concatenate(features) if features else np.zeros((0, 1), object if text else np.float32)
        names = np.array(keys, object)
        if as_filed:
            return Rows(times, value, names)
        kept = last(times)
        self.skipped += int((~kept).sum())
        order = np.argsort(times[kept, 0], kind="stable")
        return Rows(times[kept][order], value[kept][order], names[kept][order])


def root_of(file: Hdf5) -> str | None:
    """The one root group, where it holds a group of data."""
    roots = file.children()
    return roots[0] if len(roots) == 1 and "data" in file.children(roots[0]) else None


def _json(value: str):
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
