"""Folders of HDF5 files of pliang279/MFN: one data set `d1` a modality and split, or `data` with all modalities."""

import numpy as np

from layouts import Expected, ExpectedSample, Layout

SIZES = {"train": 10, "valid": 3, "test": 3}
STEPS = 5
NAMES = {"text": "text_{}_emb.h5", "audio": "audio_{}.h5", "visual": "video_{}.h5"}
MOSI = {"text": 6, "audio": 4, "visual": 3}
ICT = {"text": 300, "audio": 74, "visual": 36}


def save(path, array, key="d1"):
    import h5py

    with h5py.File(path, "w") as file:
        file[key] = array


def span(i):
    """First and one past the last real step of sample i: padding in front, or behind, or on neither side."""
    return (i % 3, STEPS) if i % 2 else (0, STEPS - i % 2)


def values(split, modality, features):
    rng = np.random.default_rng([len(split), len(modality)])
    array = rng.normal(size=(SIZES[split], STEPS, features)) + 3
    for i in range(SIZES[split]):
        first, end = span(i)
        array[i, :first] = array[i, end:] = 0
    return array


def sentiment(split):
    return np.linspace(-2.5, 2.5, SIZES[split])


def stars(split):
    return np.round(2 * np.linspace(1, 5, SIZES[split])) / 2


def ratings(split):
    return 1 + (np.arange(SIZES[split])[:, None] + np.arange(17)) % 13 / 2


def classes(split):
    return np.eye(3)[np.arange(SIZES[split]) % 3]


def write(folder, features, labels, lacking=()):
    folder = folder / "mfn"
    folder.mkdir()
    for split in SIZES:
        for modality, name in NAMES.items():
            if (modality, split) not in lacking:
                save(folder / name.format(split), values(split, modality, features[modality]))
        save(folder / f"y_{split}.h5", labels(split))
    return folder


def write_joint(folder):
    folder = folder / "joint"
    folder.mkdir()
    for split in SIZES:
        array = np.concatenate([values(split, m, f) for m, f in MOSI.items()], 2)
        save(folder / f"X_{split}.h5", array, "data")
        save(folder / f"y_{split}.h5", sentiment(split), "data")
    return folder


def expected(features, labels, task="regression", targets=("label",), label_range=(-3.0, 3.0), lacking=()):
    splits = {}
    for split, n in SIZES.items():
        arrays = {m: values(split, m, f).astype("f4") for m, f in features.items()}
        splits[split] = [
            ExpectedSample(
                f"{split}/{i}",
                {m: a[i, slice(*((0, 0) if (m, split) in lacking else span(i)))] for m, a in arrays.items()},
                labels(split)[i].tolist(),
            )
            for i in range(n)
        ]
    return Expected(splits, task, targets, label_range)


POM = tuple(f"label{k}" for k in range(17))
CLASSES = ("class 0", "class 1", "class 2")
LACKING = {("audio", "train"), ("text", "valid")}
LAYOUTS = [
    Layout(
        "mfn ict-mmmo",
        lambda f: write(f, ICT, stars),
        lambda: expected(ICT, lambda s: stars(s) - 3, label_range=(-2.0, 2.0)),
        needs="h5py",
    ),
    Layout("mfn mosi", lambda f: write(f, MOSI, sentiment), lambda: expected(MOSI, sentiment), needs="h5py"),
    Layout(
        "mfn lacking",
        lambda f: write(f, MOSI, sentiment, LACKING),
        lambda: expected(MOSI, sentiment, lacking=LACKING),
        needs="h5py",
    ),
    Layout(
        "mfn pom",
        lambda f: write(f, MOSI, ratings),
        lambda: expected(MOSI, ratings, targets=POM, label_range=(1.0, 7.0)),
        needs="h5py",
    ),
    Layout(
        "mfn youtube",
        lambda f: write(f, MOSI, classes),
        lambda: expected(MOSI, lambda s: classes(s).argmax(1), "classification", CLASSES, None),
        needs="h5py",
    ),
    Layout(
        "mfn joint",
        write_joint,
        lambda: expected(MOSI, sentiment),
        {"modalities": "text:6,audio:4,visual:3"},
        "h5py",
    ),
]
