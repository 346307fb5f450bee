"""The package's own file, written by safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from python_tests.layouts import Expected, ExpectedSample, Layout

FEATURES = {"text": 3, "audio": 2, "pose": 1}
SIZES = {"train": 8, "valid": 3, "test": 3}
WORDS = ["good", "grün", "sp", "", "naïve idea"]


def _samples(split: str, task: str) -> list[ExpectedSample]:
    rng = np.random.default_rng(len(split))
    made = []
    for i in range(SIZES[split]):
        n = int(rng.integers(2, 6))
        lengths = {"text": n, "audio": 0 if i == 1 else n, "pose": n}
        values = {m: rng.normal(size=(lengths[m], f)).astype(np.float32) for m, f in FEATURES.items()}
        if i == 0:
            values["text"][0, 0], values["text"][1, 1] = np.nan, -np.inf
        label = {
            "regression": float(np.float32(rng.uniform(-2, 2))),
            "classification": i % 2,
            "multilabel": [i % 2, (i + 1) % 2, 1],
        }[task]
        made.append(
            ExpectedSample(
                name=f"{split} {i} é",
                values=values,
                label=label,
                groups={"speaker": f"s{i % 3}", "video": f"{split}{i}"},
                words=[WORDS[(i + k) % len(WORDS)] for k in range(n)],
                transcript="" if i == 2 else f"it is {i} …",
                tokens=list(range(i)),
            )
        )
    return made


TARGETS = {
    "regression": ["sentiment"],
    "classification": ["calm", "angry"],
    "multilabel": ["happy", "sad", "late"],
}


def _offsets(counts) -> np.ndarray:
    return np.cumsum([0, *counts], dtype=np.int64)


def _text(key: str, texts: list[str]) -> dict[str, np.ndarray]:
    coded = [text.encode() for text in texts]
    return {
        f"{key}/bytes": np.frombuffer(b"".join(coded), np.uint8),
        f"{key}/offsets": _offsets(map(len, coded)),
    }


def tensors(split: str, samples: list[ExpectedSample], first_id: int, task: str, dtype=np.float32) -> dict:
    """Key -> array of one split; fingerprints are left to the reader."""
    found = {}
    for modality, features in FEATURES.items():
        values = [s.values[modality] for s in samples]
        found[f"{split}/{modality}/values"] = np.concatenate(values).reshape(-1, features).astype(dtype)
        found[f"{split}/{modality}/offsets"] = _offsets(map(len, values))
    labels = np.array([s.label for s in samples])
    found[f"{split}/labels"] = labels.astype(np.int64 if task == "classification" else np.float32)
    found[f"{split}/ids"] = np.arange(first_id, first_id + len(samples))
    found |= _text(f"{split}/names", [s.name for s in samples])
    for kind in samples[0].groups:
        found |= _text(f"{split}/groups/{kind}", [s.groups[kind] for s in samples])
    found |= _text(f"{split}/transcripts", [s.transcript for s in samples])
    found |= _text(f"{split}/words", [word for s in samples for word in s.words])
    found[f"{split}/words/samples"] = _offsets(len(s.words) for s in samples)
    found[f"{split}/tokens/values"] = np.concatenate([s.tokens for s in samples]).astype(np.int32)
    found[f"{split}/tokens/offsets"] = _offsets(len(s.tokens) for s in samples)
    return found


def description(task: str, found: dict) -> dict:
    """What `data` say."""

    def split(name: str) -> dict:
        shapes = {m: found[f"{name}/{m}/values"].shape for m in FEATURES}
        return {
            "samples": SIZES[name],
            "modalities": {m: {"features": f, "steps": n} for m, (n, f) in shapes.items()},
            "groups": ["speaker", "video"],
            "beside": ["words", "transcripts", "tokens"],
        }

    return {
        "name": "small",
        "task": task,
        "targets": TARGETS[task],
        "label_range": [-3, 3] if task == "regression" else None,
        "sample_rate": 16000,
        "layout": "a layout",
        "padding": "back",
        "warnings": ["a warning"],
        "splits": {name: split(name) for name in SIZES},
    }


def arrays(task: str = "regression", dtype=np.float32) -> dict[str, np.ndarray]:
    found, first_id = {}, 0
    for split, size in SIZES.items():
        found |= tensors(split, _samples(split, task), first_id, task, dtype)
        first_id += size
    return found


def write(folder: Path, task: str = "regression", dtype=np.float32) -> Path:
    from safetensors.numpy import save_file

    path, found = folder / "small.mmfast", arrays(task, dtype)
    metadata = {"format": "mmfast-data 2", "data": json.dumps(description(task, found))}
    save_file(found, path, metadata=metadata)
    return path


def expected(task: str = "regression") -> Expected:
    return Expected(
        splits={split: _samples(split, task) for split in SIZES},
        task=task,
        targets=TARGETS[task],
        label_range=(-3.0, 3.0) if task == "regression" else None,
    )


LAYOUTS = [
    Layout(
        f"mmfast file, {task}",
        lambda folder, task=task: write(folder, task),
        lambda task=task: expected(task),
        needs="safetensors",
    )
    for task in TARGETS
]
