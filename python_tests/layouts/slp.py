"""slp's pickles: padded in front beside words, rows in lists, seven labels, words in place of vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from padded_help import SIZES, clips, missing, pad

from layouts import Expected, ExpectedSample, Layout
from layouts.mult import dump

STEPS = 6
APART = {"text": 5, "audio": 7, "visual": 9}
EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")


def seven(split: str) -> np.ndarray:
    """(N, 7) of CMU-MOSEI: sentiment and six emotions from 0 to 3."""
    n = SIZES[split]
    there = np.arange(n)[:, None] // [1, 2, 4, 1, 2, 4] % 2
    return np.concatenate([np.linspace(-3, 3, n)[:, None], there * [1, 2, 3, 0.5, 1, 2]], 1)


def segment(split: str, i: int) -> str:
    return f"{split}{i // 2}[{i}]"


def words(n: int) -> list[str]:
    return ["sp", *(f"wörd{k}" for k in range(1, n))]


def said_clips():
    """A pause whose vector is 0, a step that is 0 in all modalities, no face."""
    found = clips(21, STEPS)
    found["train"][1]["text"][0] = 0
    for array in found["train"][2].values():
        array[0] = 0
    found["train"][4]["visual"][:] = 0
    return found


def write_padded(folder: Path) -> Path:
    content = []
    for split, found in said_clips().items():
        padded = {m: pad([c[m] for c in found], STEPS, "front", np.float64) for m in found[0]}
        content.append(
            [
                {
                    "glove": padded["text"][i],
                    "audio": padded["audio"][i],
                    "visual": padded["visual"][i],
                    "raw": words(len(clip["text"])),
                    "video_id": f"{split}{i // 2}",
                    "segment_id": segment(split, i),
                    "label": seven(split)[i : i + 1],
                }
                for i, clip in enumerate(found)
            ]
        )
    return dump(folder / "mosei_unpadded.p", (*content, {"sp": 0, "wörd1": 1}))


def expected_padded(emotions: bool = False) -> Expected:
    found = said_clips()
    found["train"][4]["visual"] = missing("visual")
    splits = {}
    for split, clips_ in found.items():
        labels = seven(split)[:, 1:] > 0 if emotions else seven(split)[:, 0]
        splits[split] = [
            ExpectedSample(
                segment(split, i),
                clip,
                labels[i],
                {"video": f"{split}{i // 2}"},
                words=words(len(clip["text"])),
            )
            for i, clip in enumerate(clips_)
        ]
    if emotions:
        return Expected(splits, "multilabel", EMOTIONS)
    return Expected(splits, "regression", ("sentiment",), (-3, 3))


def write_lists(folder: Path) -> Path:
    """A dict of splits, rows in lists, not aligned, no words and no names."""
    content = {}
    for split, found in clips(22, APART).items():
        content["dev" if split == "valid" else split] = [
            {**{m: array.tolist() for m, array in clip.items()}, "label": float(seven(split)[i, 0])}
            for i, clip in enumerate(found)
        ]
    return dump(folder / "lists.pkl", content, protocol=2)


def expected_lists() -> Expected:
    splits = {
        split: [ExpectedSample(f"{split}/{i}", clip, seven(split)[i, 0]) for i, clip in enumerate(found)]
        for split, found in clips(22, APART).items()
    }
    return Expected(splits, "regression", ("label",), (-3, 3))


def write_words(folder: Path) -> Path:
    content = []
    for split, found in clips(23, STEPS).items():
        content.append(
            [
                {
                    "text": words(len(clip["text"])),
                    "audio": clip["audio"],
                    "visual": clip["visual"],
                    "segment_id": segment(split, i),
                    "label": seven(split)[i : i + 1, :1],
                }
                for i, clip in enumerate(found)
            ]
        )
    return dump(folder / "words.pkl", content)


def expected_words() -> Expected:
    splits = {
        split: [
            ExpectedSample(
                segment(split, i),
                {m: clip[m] for m in ("audio", "visual")},
                seven(split)[i, 0],
                {"video": f"{split}{i // 2}"},
                words=words(len(clip["text"])),
            )
            for i, clip in enumerate(found)
        ]
        for split, found in clips(23, STEPS).items()
    }
    return Expected(splits, "regression", ("label",), (-3, 3))


LAYOUTS = [
    Layout("slp padded", write_padded, expected_padded),
    Layout("slp emotions", write_padded, lambda: expected_padded(emotions=True), {"labels": "emotions"}),
    Layout("slp lists", write_lists, expected_lists),
    Layout("slp words", write_words, expected_words),
]
