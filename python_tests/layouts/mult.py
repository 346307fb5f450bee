"""MulT's pickles: aligned with zeros in front, not aligned, IEMOCAP's pairs, MultiBench's labels."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from padded_help import SIZES, clips, missing, pad

from layouts import Expected, ExpectedSample, Layout

THEIRS = {"text": "text", "audio": "audio", "visual": "vision"}
STEPS = 6
APART = {"text": 4, "audio": 7, "visual": 9}


def sentiment(split: str) -> np.ndarray:
    labels = np.linspace(-3, 3, SIZES[split])
    if split == "train":
        labels[-1] = 10 / 3  # as a few of MOSEI
    return labels.astype(np.float32)


def segments(split: str) -> list[tuple[str, str, str]]:
    return [(f"{split}é_{i // 2}", f"{i}.5", f"{i + 2}.25") for i in range(SIZES[split])]


def dump(path: Path, content, protocol: int = 4) -> Path:
    with path.open("wb") as file:
        pickle.dump(content, file, protocol)
    return path


def split_of(found, steps, side: str, dtype=np.float32) -> dict:
    steps = steps if isinstance(steps, dict) else dict.fromkeys(THEIRS, steps)
    return {theirs: pad([c[m] for c in found], steps[m], side, dtype) for m, theirs in THEIRS.items()}


def aligned_clips():
    """A pause in front, a word without a vector at the end, a face not found, silence of minus infinity."""
    found = clips(1, STEPS)
    found["train"][1]["visual"][0] = 0
    found["train"][2]["text"][-1] = 0
    found["train"][3]["visual"][1] = 0
    found["train"][4]["audio"][0, 1] = -np.inf
    found["train"][5]["audio"][:] = 0
    return found


def write_aligned(folder: Path) -> Path:
    content = {}
    for split, found in aligned_clips().items():
        ids = np.array([[cell.encode() for cell in row] for row in segments(split)])
        content[split] = {
            **split_of(found, STEPS, "front"),
            "id": ids,
            "labels": sentiment(split)[:, None, None],
        }
    return dump(folder / "mosi_data.pkl", content, protocol=2)


def expected_aligned() -> Expected:
    found = aligned_clips()
    found["train"][5]["audio"] = missing("audio")
    return with_videos(found)


def with_videos(found) -> Expected:
    splits = {
        split: [
            ExpectedSample(f"{video}[{start},{end}]", clip, label, {"video": video})
            for clip, label, (video, start, end) in zip(
                clips_, sentiment(split), segments(split), strict=True
            )
        ]
        for split, clips_ in found.items()
    }
    return Expected(splits, "regression", ("label",), (-3, 3))


def write_apart(folder: Path) -> Path:
    content = {}
    for split, found in clips(2, APART).items():
        entry = split_of(found, APART, "front", np.float64)
        content[split] = {**entry, "id": np.array(segments(split)), "labels": sentiment(split)[:, None, None]}
    return dump(folder / "mosei_senti_data_noalign.pkl", content)


def emotions(split: str) -> np.ndarray:
    return np.arange(SIZES[split])[:, None] // [1, 2, 4, 1] % 2


def write_pairs(folder: Path) -> Path:
    content = {}
    for split, found in clips(3, STEPS).items():
        present = emotions(split)
        pairs = np.stack([1 - present, present], axis=-1)
        content[split] = {**split_of(found, STEPS, "front"), "labels": pairs.astype(np.int64)}
    return dump(folder / "iemocap_data.pkl", content)


def expected_pairs() -> Expected:
    splits = {
        split: [
            ExpectedSample(f"{split}/{i}", clip, emotions(split)[i].astype(float))
            for i, clip in enumerate(found)
        ]
        for split, found in clips(3, STEPS).items()
    }
    return Expected(splits, "multilabel", ("neutral", "happy", "sad", "angry"))


def write_humor(folder: Path) -> Path:
    content = {}
    for split, found in clips(4, STEPS).items():
        n = SIZES[split]
        content[split] = {
            **split_of(found, STEPS, "front"),
            "id": np.arange(n)[:, None] + 100,
            "labels": (np.arange(n) % 2)[:, None],
        }
    return dump(folder / "humor.pkl", content)


def expected_humor(task: str = "regression") -> Expected:
    splits = {
        split: [ExpectedSample(str(100 + i), clip, float(i % 2)) for i, clip in enumerate(found)]
        for split, found in clips(4, STEPS).items()
    }
    if task == "regression":
        return Expected(splits, task, ("label",), (-3, 3))
    return Expected(splits, task, ("class 0", "class 1"))


LAYOUTS = [
    Layout("MulT aligned", write_aligned, expected_aligned),
    Layout("MulT not aligned", write_apart, lambda: with_videos(clips(2, APART))),
    Layout("MulT IEMOCAP", write_pairs, expected_pairs),
    Layout("MultiBench humor", write_humor, expected_humor),
    Layout(
        "MultiBench humor as classes",
        write_humor,
        lambda: expected_humor("classification"),
        {"labels": "classification"},
    ),
]
