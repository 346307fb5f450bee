"""MMSA's and MMSA-FET's files: aligned by the mask of the tokens, lengths of each modality, zeros in front, HDF5."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from padded_help import FEATURES, SIZES, clips, missing, pad

from layouts import Expected, ExpectedSample, Layout
from layouts.mult import dump, split_of

STEPS = 6
APART = {"text": 5, "audio": 7, "visual": 9}
COLUMNS = {"M": 0.0, "T": 0.2, "A": -0.2, "V": 0.4}


def ids(split: str, pattern: str = "{}_v{}$_${}") -> list[str]:
    return [pattern.format(split, i // 2, i) for i in range(SIZES[split])]


def texts(split: str) -> list[str]:
    return [f"très bien {i} 很好" for i in range(SIZES[split])]


def labels(split: str, column: str = "M", scale: float = 3.0) -> np.ndarray:
    return np.clip(np.linspace(-scale, scale, SIZES[split]) + COLUMNS[column], -scale, scale).astype(
        np.float32
    )


def tokens(n: int) -> np.ndarray:
    return np.array([101, *range(1000, 1000 + n - 2), 102][:n])


def bert(lengths, steps: int, side: str = "back", dtype=np.float32) -> np.ndarray:
    """(N, 3, steps): ids, mask, segments."""
    out = np.zeros((len(lengths), 3, steps), dtype)
    for row, n in zip(out, lengths, strict=True):
        here = slice(steps - n, None) if side == "front" else slice(n)
        row[0, here], row[1, here] = tokens(n), 1
    return out


def classes(split: str) -> np.ndarray:
    return np.arange(SIZES[split]) % 3


def aligned_clips():
    """An unknown word at the end that is zero in every modality: the mask says that it is there."""
    found = clips(11, STEPS)
    for modality in FEATURES:
        found["train"][2][modality][-1] = 0
    return found


def write_aligned(folder: Path) -> Path:
    content = {}
    for split, found in aligned_clips().items():
        content[split] = {
            **split_of(found, STEPS, "back"),
            "text_bert": bert([len(c["text"]) for c in found], STEPS),
            "raw_text": texts(split),
            "id": ids(split),
            "annotations": ["Neutral"] * len(found),
            "regression_labels": labels(split).tolist(),
            "classification_labels": classes(split).tolist(),
        }
    return dump(folder / "aligned_50.pkl", content)


def expected(
    found, label, targets=("label",), label_range=(-3, 3), task="regression", pattern=None
) -> Expected:
    splits = {}
    for split, clips_ in found.items():
        named = ids(split) if pattern is None else ids(split, pattern)
        splits[split] = [
            ExpectedSample(
                name,
                clip,
                value,
                {"video": name.split("$_$")[0].split("[")[0]},
                transcript=text,
                tokens=tokens(len(clip["text"])),
            )
            for name, clip, value, text in zip(named, clips_, label(split), texts(split), strict=True)
        ]
    return Expected(splits, task, targets, None if task != "regression" else label_range)


def apart_clips():
    """A modality of length 0, and one of a single step of zeros."""
    found = clips(12, APART)
    found["train"][3]["visual"] = missing("visual")
    found["train"][4]["audio"] = missing("audio")
    return found


def write_apart(folder: Path) -> Path:
    """CH-SIMS: lengths as lists, labels of each modality, ids with brackets in arrays."""
    content = {}
    for split, found in apart_clips().items():
        lengths = {m: [len(c[m]) for c in found] for m in FEATURES}
        if split == "train":
            lengths["audio"][4] = 1  # MMSA-FET of a clip without a face or sound
        content[split] = {
            **split_of(found, APART, "back"),
            "text_bert": bert(lengths["text"], APART["text"], dtype=np.int64),
            "audio_lengths": lengths["audio"],
            "vision_lengths": lengths["visual"],
            "raw_text": np.array(texts(split)),
            "id": np.array(ids(split, "{}_v{}[{}]")),
            "regression_labels": labels(split, "M", 1.0),
            **{f"regression_labels_{m}": labels(split, m, 1.0)[:, None] for m in "TAV"},
        }
    return dump(folder / "unaligned_39.pkl", content)


def expected_apart(label, targets=("label",)) -> Expected:
    return expected(apart_clips(), label, targets, (-1, 1), pattern="{}_v{}[{}]")


def all_columns(split: str) -> np.ndarray:
    return np.stack([labels(split, column, 1.0) for column in "MTAV"], axis=1)


def extracted_clips():
    return clips(13, APART)


def write_extracted(folder: Path) -> Path:
    """MMSA-FET: float64, zeros in front, the longest cut while lengths say what they were, a configuration beside."""
    content: dict = {"config": {"audio": {"tool": "librosa"}, "align": None}}
    for split, found in extracted_clips().items():
        lengths = {m: np.array([len(c[m]) for c in found]) for m in FEATURES}
        lengths["audio"][0] += 3
        content[split] = {
            **split_of(found, APART, "front", np.float64),
            "text_bert": bert(lengths["text"], APART["text"], "front", np.float64),
            "audio_lengths": lengths["audio"],
            "vision_lengths": lengths["visual"],
            "raw_text": np.array(texts(split)),
            "id": np.array(ids(split)),
            "regression_labels": labels(split).astype(np.float64),
        }
    return dump(folder / "feature.pkl", content, protocol=5)


def write_hdf5(folder: Path) -> Path:
    import h5py

    with h5py.File(folder / "aligned.h5", "w") as file:
        for split, found in aligned_clips().items():
            group = file.create_group(split)
            for key, value in split_of(found, STEPS, "back").items():
                group[key] = value
            group["text_bert"] = bert([len(c["text"]) for c in found], STEPS)
            group["regression_labels"] = labels(split)
            group["id"] = [name.encode() for name in ids(split)]
            group.create_dataset("raw_text", data=texts(split), dtype=h5py.string_dtype())
    return folder / "aligned.h5"


def without_text(found) -> Expected:
    """No text and no tokens: audio and visual alone, cut by their zeros."""
    splits = {
        split: [
            ExpectedSample(f"{split}/{i}", {m: clip[m] for m in ("audio", "visual")}, labels(split)[i])
            for i, clip in enumerate(clips_)
        ]
        for split, clips_ in found.items()
    }
    return Expected(splits, "regression", ("label",), (-3, 3))


def write_without_text(folder: Path) -> Path:
    content = {}
    for split, found in clips(14, STEPS).items():
        padded = {
            k: pad([c[m] for c in found], STEPS, "back")
            for k, m in (("audio", "audio"), ("vision", "visual"))
        }
        content[split] = {**padded, "regression_labels": labels(split)}
    return dump(folder / "no_text.pkl", content)


LAYOUTS = [
    Layout("MMSA aligned", write_aligned, lambda: expected(aligned_clips(), labels)),
    Layout(
        "MMSA classes",
        write_aligned,
        lambda: expected(
            aligned_clips(), classes, ("negative", "neutral", "positive"), task="classification"
        ),
        {"labels": "classification"},
    ),
    Layout("MMSA CH-SIMS", write_apart, lambda: expected_apart(lambda split: labels(split, "M", 1.0))),
    Layout(
        "MMSA CH-SIMS text",
        write_apart,
        lambda: expected_apart(lambda split: labels(split, "T", 1.0)),
        {"labels": "T"},
    ),
    Layout(
        "MMSA CH-SIMS all", write_apart, lambda: expected_apart(all_columns, tuple("MTAV")), {"labels": "all"}
    ),
    Layout("MMSA-FET", write_extracted, lambda: expected(extracted_clips(), labels)),
    Layout("MMSA without text", write_without_text, lambda: without_text(clips(14, STEPS))),
    Layout("MMSA HDF5", write_hdf5, lambda: expected(aligned_clips(), labels), needs="h5py"),
]
