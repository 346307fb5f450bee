"""TAILOR's torch file, and its labels beside MulT's features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from padded_help import SIZES, clips, pad

from layouts import Expected, ExpectedSample, Layout
from layouts.mult import APART, dump, segments, split_of

STEPS = 6
EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")


def present(split: str, i: int) -> list[int]:
    return [k for k in range(6) if (i + len(split)) >> (k % 4) & 1 and (k < 4 or i % 3)]


def content(wrap) -> dict:
    made = {}
    for split, found in clips(5, STEPS).items():
        made[split] = {f"src-{m}": wrap(pad([c[m] for c in found], STEPS, "back")) for m in found[0]}
        made[split]["tgt"] = [[2, *(4 + k for k in present(split, i)), 3] for i in range(len(found))]
    return made


def write_torch(folder: Path) -> Path:
    torch.save(content(torch.from_numpy), folder / "aligned.pt")
    return folder / "aligned.pt"


def write_lists(folder: Path) -> Path:
    torch.save(content(list), folder / "lists.pt")
    return folder / "lists.pt"


def label(split: str, i: int) -> np.ndarray:
    return np.isin(np.arange(6), present(split, i)).astype(float)


def expected(found, names=None) -> Expected:
    splits = {
        split: [
            ExpectedSample(
                f"{split}/{i}" if names is None else names(split)[i][0],
                clip,
                label(split, i),
                {} if names is None else names(split)[i][1],
            )
            for i, clip in enumerate(clips_)
        ]
        for split, clips_ in found.items()
    }
    return Expected(splits, "multilabel", EMOTIONS)


def write_apart(folder: Path) -> Path:
    made = {}
    for split, found in clips(6, APART).items():
        made[split] = {**split_of(found, APART, "front"), "id": np.array(segments(split))}
        made[split]["labels"] = np.zeros((SIZES[split], 1, 1), np.float32)
    return dump(folder / "mosei_senti_data_noalign.pkl", made)


def labels_beside(folder: Path) -> dict[str, str]:
    return {"labels_from": str(write_torch(folder))}


def in_videos(split: str):
    return [(f"{video}[{start},{end}]", {"video": video}) for video, start, end in segments(split)]


LAYOUTS = [
    Layout("TAILOR", write_torch, lambda: expected(clips(5, STEPS))),
    Layout("TAILOR lists", write_lists, lambda: expected(clips(5, STEPS))),
    Layout(
        "MulT with labels of TAILOR",
        write_apart,
        lambda: expected(clips(6, APART), in_videos),
        options_from=labels_beside,
    ),
]
