"""Clips of a few steps, and how other repositories pad them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

SIZES = {"train": 8, "valid": 3, "test": 3}
FEATURES = {"text": 4, "audio": 3, "visual": 2}


def clips(seed: int, longest: dict[str, int] | int) -> dict[str, list[dict[str, np.ndarray]]]:
    """Split -> clips, each modality -> (n, F) float32 without zeros; one n for all if `longest` is one number.

    The first clip of each split is as long as possible.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for split, size in SIZES.items():
        found[split] = []
        for i in range(size):
            together = rng.integers(2, longest + 1) if isinstance(longest, int) else None
            clip = {}
            for modality, features in FEATURES.items():
                most = longest if isinstance(longest, int) else longest[modality]
                n = most if i == 0 else together or rng.integers(2, most + 1)
                clip[modality] = (1 + rng.random((n, features))).astype(np.float32)
            found[split].append(clip)
    return found


def pad(arrays: Sequence[np.ndarray], steps: int, side: str, dtype=np.float32) -> np.ndarray:
    """(N, steps, F) with zeros in front or at the back."""
    out = np.zeros((len(arrays), steps, arrays[0].shape[1]), dtype)
    for row, array in zip(out, arrays, strict=True):
        start = steps - len(array) if side == "front" else 0
        row[start : start + len(array)] = array
    return out


def missing(modality: str) -> np.ndarray:
    return np.empty((0, FEATURES[modality]), np.float32)


class Held:
    """A source whose content is at hand, and stands in no file."""

    kind = "pickle"

    def __init__(self, content, name: str = "x.pkl") -> None:
        self.path, self.content = Path(name), content

    def object(self):
        return self.content


def changed(content: dict, split: str, **entries) -> dict:
    """A copy with other entries in a split; None takes one out."""
    entry = {k: v for k, v in (content[split] | entries).items() if v is not None}
    return {**content, split: entry}


def bomb() -> list:
    """A few lists, which are 10 ** 30 numbers to whoever looks at all."""
    found = [1.0] * 10
    for _ in range(30):
        found = [found] * 10
    return found


def odd_values(n: int) -> list:
    """What may stand in a file where something else should."""
    strings = np.array(["a"] * n, dtype=object)
    return [
        *(None, 3, "x", b"x", [], {}, [[]], bomb(), True, float("nan"), 10**400, np.array(5), np.array("a")),
        *(np.zeros(0), np.zeros(n), np.zeros((n, 6)), np.zeros((n, 0, 4)), np.zeros((0, 6, 4))),
        *(np.zeros((n, 6, 4)), np.full((n, 6, 4), np.nan), np.zeros((n, 6, 4), complex), np.zeros((n, 3, 6))),
        *(strings, strings.astype("U1"), strings.astype("S1"), np.zeros((n, 1, 1, 1)), np.full(n, 1e300)),
        *([None] * n, [1.5] * n, [[1, 2]] * n, ["x"] * n, [np.zeros(0)] * n, [bomb()] * n, ["y" * 10**6] * n),
        *([2, 3], [[2, 3]] * n, [[2, 4, 3]] * (n + 1), [np.zeros((6, 4))] * n, list(np.zeros((n, 5, 4)))),
        *(torch.zeros(n, 6, 4), torch.zeros(1).expand(n, 2**31, 64), torch.zeros(n, 6, 4).to_sparse()),
        *(torch.ones(n, 3, 6, dtype=torch.bfloat16), np.full(n, -1), np.full(n, 2**62), {"a": 1}),
    ]
