"""MISA's folders, with and without vectors of words, and MAG-BERT's pickles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from padded_help import SIZES, clips, missing

from layouts import Expected, ExpectedSample, Layout
from layouts.mult import dump
from layouts.slp import segment, words

STEPS = 6
THEIRS = {"train": "train", "valid": "dev", "test": "test"}


def labels(split: str) -> np.ndarray:
    return np.linspace(-3, 3, SIZES[split])


def humor(split: str) -> np.ndarray:
    return np.arange(SIZES[split]) % 2


def vector(word: str) -> list[float]:
    """Of "wörd3" the numbers of 3; of a pause 0."""
    k = 0 if word == "sp" else int(word.removeprefix("wörd"))
    return [k, k / 2, -k, 2 * k]


def samples(seed: int):
    """One sample is empty, one has no sound."""
    found = clips(seed, STEPS)
    found["train"][3] = {m: missing(m) for m in found["train"][3]}
    found["train"][5]["audio"] = missing("audio")
    return found


def spoken(clip) -> list[str]:
    return words(len(clip["text"])) if len(clip["text"]) else []


def write_folder(folder: Path) -> Path:
    (folder / "MOSI").mkdir()
    for split, found in samples(31).items():
        content = [
            (
                (
                    np.arange(len(clip["text"])),
                    clip["visual"].astype(np.float64),
                    clip["audio"].astype(np.float64),
                    spoken(clip),
                ),
                np.array([[labels(split)[i]]], np.float32),
                segment(split, i).encode(),
            )
            for i, clip in enumerate(found)
        ]
        dump(folder / "MOSI" / f"{THEIRS[split]}.pkl", content)
    lines = [f"{word} {' '.join(map(str, vector(word)))}" for word in words(STEPS)]
    (folder / "vectors.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "MOSI"


def expected(seed: int, label, vectors: bool = False, task: str = "regression") -> Expected:
    splits = {}
    for split, found in samples(seed).items():
        splits[split] = []
        for i, clip in enumerate(found):
            values = {m: clip[m] for m in ("audio", "visual")}
            if vectors:
                values["text"] = np.array([vector(w) for w in spoken(clip)], np.float32).reshape(-1, 4)
            splits[split].append(
                ExpectedSample(
                    segment(split, i),
                    values,
                    label(split)[i],
                    {"video": f"{split}{i // 2}"},
                    words=spoken(clip),
                )
            )
    if task == "classification":
        return Expected(splits, task, ("class 0", "class 1"))
    return Expected(splits, task, ("label",), (-3, 3))


def write_mag(folder: Path) -> Path:
    content = {}
    for split, found in samples(32).items():
        content[THEIRS[split]] = [
            ((spoken(clip), clip["visual"], clip["audio"]), np.array([[humor(split)[i]]]), segment(split, i))
            for i, clip in enumerate(found)
        ]
    return dump(folder / "mosi.pkl", content)


LAYOUTS = [
    Layout("MISA folder", write_folder, lambda: expected(31, labels)),
    Layout(
        "MISA folder with vectors",
        write_folder,
        lambda: expected(31, labels, vectors=True),
        options_from=lambda folder: {"embedding": str(folder / "vectors.txt")},
    ),
    Layout("MAG-BERT pickle", write_mag, lambda: expected(32, humor)),
    Layout(
        "UR-FUNNY as classes",
        write_mag,
        lambda: expected(32, humor, task="classification"),
        {"labels": "classification"},
    ),
]
