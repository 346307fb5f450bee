"""The package's own archive, as another program writes it from the format's description."""

import numpy as np

from layouts import Expected, ExpectedSample, Layout

SIZES = {"train": 8, "valid": 3, "test": 3}
F = {"audio": 3, "text": 2}


def lengths(modality, n):
    return np.array([(i + len(modality)) % 4 for i in range(n)])


def flat(split, modality):
    steps = lengths(modality, SIZES[split]).sum()
    return np.random.default_rng([len(split), len(modality)]).normal(size=(steps, F[modality])).astype("f4")


def write(folder):
    content = {"format": np.array("mmfast-data 1"), "name": np.array("mine")}
    content["label_range"] = np.array([-2.0, 2.0])
    for split, n in SIZES.items():
        content[f"{split}/labels"] = np.linspace(-1, 1, n)
        content[f"{split}/names"] = np.array([f"{split} {i}" for i in range(n)])
        content[f"{split}/groups"] = np.array([f"{split} speaker {i % 2}" for i in range(n)])
        for modality in F:
            content[f"{split}/{modality}/values"] = flat(split, modality)
            content[f"{split}/{modality}/lengths"] = lengths(modality, n)
    np.savez(folder / "own.npz", **content)
    return folder / "own.npz"


def expected():
    splits = {}
    for split, n in SIZES.items():
        parts = {m: np.split(flat(split, m), np.cumsum(lengths(m, n))[:-1]) for m in F}
        splits[split] = [
            ExpectedSample(
                f"{split} {i}",
                {m: parts[m][i] for m in F},
                float(np.float32(np.linspace(-1, 1, n)[i])),
                {"group": f"{split} speaker {i % 2}"},
            )
            for i in range(n)
        ]
    return Expected(splits, "regression", ("label",), (-2.0, 2.0))


LAYOUTS = [Layout("mmfast npz", write, expected)]
