"""Archives and HDF5 files that somebody wrote with keys of their own: SPLIT/NAME, SPLIT_NAME, SPLIT.NAME, NAME."""

import numpy as np

from layouts import Expected, ExpectedSample, Layout

SIZES = {"train": 9, "val": 3, "test": 3}
OURS = {"train": "train", "val": "valid", "test": "test", None: "train"}
STEPS = {"text": 4, "vision": 6}
F = {"text": 3, "vision": 2}
TARGETS = {"text": "text", "vision": "visual"}


def length(modality, i):
    return 1 + i % STEPS[modality]


def padded(split, modality):
    n = SIZES.get(split, 9)
    rng = np.random.default_rng([len(split or ""), len(modality)])
    array = rng.normal(size=(n, STEPS[modality], F[modality])) + 4
    for i in range(n):
        array[i, length(modality, i) :] = 0
    return array


def numbers(split):
    return np.linspace(-2, 2, SIZES.get(split, 9))


def moods(split):
    return np.array(["glad", "sad", "glad"] * 3)[: SIZES.get(split, 9)]


def arrays(split, labels, lengths=False):
    out = {m: padded(split, m) for m in STEPS} | {"labels": labels(split)}
    if lengths:
        n = SIZES.get(split, 9)
        out |= {f"{m}_lengths": np.array([length(m, i) for i in range(n)]) for m in STEPS}
        out["names"] = np.array([f"clip {split} {i}".encode() for i in range(n)])
    return out


def keyed(sign, labels=numbers, lengths=False, splits=tuple(SIZES)):
    return {
        f"{split}{sign}{name}" if split else name: array
        for split in splits
        for name, array in arrays(split, labels, lengths).items()
    }


def npz(folder, content):
    np.savez_compressed(folder / "mine.npz", **content)
    return folder / "mine.npz"


def h5(folder, content):
    import h5py

    with h5py.File(folder / "mine.h5", "w") as file:
        for key, array in content.items():
            file[key] = array
    return folder / "mine.h5"


def expected(labels=numbers, named=False, splits=tuple(SIZES)):
    found = {}
    for split in splits:
        ours = OURS[split]
        found[ours] = [
            ExpectedSample(
                f"clip {split} {i}" if named else f"{ours}/{i}",
                {TARGETS[m]: padded(split, m)[i, : length(m, i)].astype("f4") for m in STEPS},
                float(labels(split)[i]) if labels is numbers else int(labels(split)[i] == "sad"),
            )
            for i in range(SIZES.get(split, 9))
        ]
    if labels is moods:
        return Expected(found, "classification", ("glad", "sad"))
    return Expected(found, "regression", ("label",), (-3.0, 3.0))


LAYOUTS = [
    Layout("npz SPLIT/NAME", lambda f: npz(f, keyed("/")), expected),
    Layout(
        "npz SPLIT_NAME with lengths",
        lambda f: npz(f, keyed("_", lengths=True)),
        lambda: expected(named=True),
    ),
    Layout("npz SPLIT.NAME of moods", lambda f: npz(f, keyed(".", moods)), lambda: expected(moods)),
    Layout("npz NAME", lambda f: npz(f, keyed("", splits=(None,))), lambda: expected(splits=(None,))),
    Layout(
        "h5 groups", lambda f: h5(f, keyed("/", lengths=True)), lambda: expected(named=True), needs="h5py"
    ),
    Layout("h5 SPLIT_NAME", lambda f: h5(f, keyed("_")), expected, needs="h5py"),
]
