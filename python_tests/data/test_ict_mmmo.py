import os
import re
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from mmfast.data import MultimodalDataset, Standardiser, folds, read_ict_mmmo
from mmfast.errors import UserError

SHARED = Path(os.environ.get("MMFAST_SHARED", Path(__file__).parents[3] / "shared"))
REAL = SHARED / "data" / "ict_mmmo"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real ICT-MMMO folder is not here")

SIZES = {"train": 4, "valid": 3, "test": 2}
FEATURES = {"text": 300, "audio": 74, "video": 36}
STEPS = 8


def write(path, array, key="d1"):
    with h5py.File(path, "w") as file:
        file[key] = array


def file_name(modality, split):
    return f"{modality}_{split}{'_emb' if modality == 'text' else ''}.h5"


@pytest.fixture
def folder(tmp_path):
    """A small folder in the corpus's layout; text of train is missing.

    Sample 0 of each split has two padded steps in front, sample 1 one at the back, video a zero step inside.
    """
    rng = np.random.default_rng(0)
    for split, n in SIZES.items():
        for modality, size in FEATURES.items():
            array = rng.normal(size=(n, STEPS, size)) + 10
            array[0, :2] = 0
            array[1, -1:] = 0
            if modality == "video":
                array[:, 4] = 0
                array[0, 2] = 0
            if (modality, split) != ("text", "train"):
                write(tmp_path / file_name(modality, split), array)
        write(tmp_path / f"y_{split}.h5", np.round(2 * np.linspace(1, 5, n)) / 2)
    return tmp_path


def test_sizes_ids_names_and_labels(folder):
    data = read_ict_mmmo(folder)
    assert {name: len(split) for name, split in data.splits().items()} == {**SIZES, "unlabelled": 4}
    assert data.features == {"text": 300, "audio": 74, "visual": 36}
    assert data.label_range == (-2, 2) and data.name == "ICT-MMMO"
    assert data.valid.labels.tolist() == [-2, 0, 2]
    assert data.test.ids.tolist() == [7, 8] and data.test.names == ["test/0", "test/1"]


def test_lengths_come_from_steps_that_are_zero_everywhere(folder):
    data = read_ict_mmmo(folder)
    for modality in data.modalities:
        assert data.valid.lengths(modality).tolist() == [6, 7, 8]
    with h5py.File(folder / "audio_valid.h5") as file:
        audio = file["d1"][()].astype(np.float32)
    assert np.array_equal(data.valid[0].values["audio"], audio[0, 2:])
    assert np.array_equal(data.valid[1].values["audio"], audio[1, :-1])
    visual = data.valid[0].values["visual"]
    assert visual.count_nonzero(1).tolist() == [0, 36, 0, 36, 36, 36], (
        "zero steps inside and at one end are real"
    )


def test_train_without_text_is_the_pool_and_keeps_its_labels(folder):
    data = read_ict_mmmo(folder)
    assert data.unlabelled is data.train
    assert data.train.lengths("text").tolist() == [0] * 4 and data.train.lengths("audio").tolist() == [
        6,
        7,
        8,
        8,
    ]
    assert not torch.isnan(data.train.labels).any()
    assert data.cross_validation.ids.tolist() == [4, 5, 6, 7, 8]


def test_with_text_everywhere_the_splits_are_usable(folder):
    write(folder / "text_train_emb.h5", np.ones((4, STEPS, 300)))
    data = read_ict_mmmo(folder)
    assert data.unlabelled is None and data.cross_validation is None
    assert data.train.lengths("text").tolist() == [8] * 4


def test_a_modality_that_is_zero_throughout_a_sample_is_missing(folder):
    with h5py.File(folder / "text_valid_emb.h5", "r+") as file:
        file["d1"][2] = 0
    data = read_ict_mmmo(folder)
    assert data.valid.lengths("text").tolist() == [6, 7, 0] and data.valid.lengths("audio").tolist() == [
        6,
        7,
        8,
    ]
    assert data.cross_validation.ids.tolist() == [4, 5, 7, 8]


def test_a_sample_with_nothing_has_length_zero(folder):
    for modality in FEATURES:
        with h5py.File(folder / file_name(modality, "test"), "r+") as file:
            file["d1"][1] = 0
    data = read_ict_mmmo(folder)
    assert [int(data.test.lengths(m)[1]) for m in data.modalities] == [0, 0, 0]


def test_broken_cells_are_kept_for_the_standardiser(folder):
    with h5py.File(folder / "audio_train.h5", "r+") as file:
        file["d1"][2, 0] = np.nan
        file["d1"][2, 1, 0] = -np.inf
        file["d1"][2, 1, 1] = 1e300
    data = read_ict_mmmo(folder)
    assert data.train.lengths("audio")[2] == 8
    counts = Standardiser().fit(data.train).nonfinite["audio"]
    assert (counts.nan, counts.inf) == (74, 2)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD = [
    ("audio_train.h5", Path.unlink, "no such file"),
    ("y_test.h5", Path.unlink, "no such file"),
    ("text_valid_emb.h5", Path.unlink, "no such file"),
    ("audio_valid.h5", truncate, "not a readable HDF5 file, truncated or of another kind"),
    ("audio_valid.h5", lambda p: p.write_bytes(b""), "not a readable HDF5 file"),
    ("video_test.h5", lambda p: p.write_text("hello"), "not a readable HDF5 file"),
    ("video_test.h5", lambda p: (p.unlink(), p.mkdir()), "must be a regular file, got a folder"),
    (
        "y_train.h5",
        lambda p: write(p, np.ones(4), "labels"),
        "must hold a data set named d1, found ['labels']",
    ),
    ("y_train.h5", lambda p: write(p, np.ones(4), "d1/x"), "must hold a data set named d1, found ['d1']"),
    ("y_train.h5", lambda p: h5py.File(p, "w").close(), "must hold a data set named d1, found nothing"),
    ("y_train.h5", lambda p: write(p, np.ones((4, 1))), "d1 must have shape (N,), got (4, 1)"),
    ("audio_train.h5", lambda p: write(p, np.ones((4, 5))), "d1 must have shape (N, L, F), got (4, 5)"),
    ("audio_train.h5", lambda p: write(p, np.ones((0, 8, 5))), "must not be empty, got shape (0, 8, 5)"),
    ("audio_train.h5", lambda p: write(p, b"words"), "d1 must hold numbers, got dtype"),
    ("audio_train.h5", lambda p: write(p, np.ones((9, 8, 5))), "must have N = 4 as y_train.h5, got 9"),
    ("video_train.h5", lambda p: write(p, np.ones((4, 7, 36))), "must have L = 8 as audio of train, got 7"),
    (
        "video_valid.h5",
        lambda p: write(p, np.ones((3, 8, 35))),
        "must have F = 36 as visual of ICT-MMMO, got 35",
    ),
    (
        "y_valid.h5",
        lambda p: write(p, np.array([1, 2, 0.5])),
        "halves in 1..5 as those of ICT-MMMO, got 0.5 in d1[2]",
    ),
    (
        "y_valid.h5",
        lambda p: write(p, np.array([1, np.nan, 2])),
        "halves in 1..5 as those of ICT-MMMO, got nan in d1[1]",
    ),
    (
        "y_valid.h5",
        lambda p: write(p, np.array([1, 2.7, 2])),
        "halves in 1..5 as those of ICT-MMMO, got 2.7 in d1[1]",
    ),
]


def test_another_corpus_under_the_same_names_is_told_by_its_contents(tmp_path):
    for split, n in SIZES.items():
        for modality, size in {"text": 300, "audio": 43, "video": 20}.items():
            write(tmp_path / file_name(modality, split), np.ones((n, STEPS, size)))
        write(tmp_path / f"y_{split}.h5", np.ones(n))
    with pytest.raises(UserError, match=r"audio_train.h5: d1 must have F = 74 as audio of ICT-MMMO, got 43"):
        read_ict_mmmo(tmp_path)


@pytest.mark.parametrize(("name", "damage", "message"), BAD)
def test_bad_files_give_one_sentence(folder, name, damage, message):
    damage(folder / name)
    with pytest.raises(
        UserError, match=re.escape(f"{folder / name}: ") + ".*" + re.escape(message)
    ) as caught:
        read_ict_mmmo(folder)
    assert "\n" not in str(caught.value)


def test_no_such_folder():
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_ict_mmmo("nowhere")


def test_damage_anywhere_is_a_user_error(folder):
    rng = np.random.default_rng(0)
    path = folder / "audio_valid.h5"
    whole = path.read_bytes()
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole) // 3)] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            outcomes.add(len(read_ict_mmmo(folder).valid))
        except UserError:
            outcomes.add("refused")
    assert outcomes == {3, "refused"}


def test_says_so_without_h5py(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"reading HDF5 needs h5py, install mmfast\[train\] or h5py"):
        read_ict_mmmo(folder)


def pooled(dataset: MultimodalDataset):
    return np.array(
        [np.concatenate([s.values[m].mean(0) for m in dataset.modalities]) for s in dataset], dtype=np.float64
    )


def ridge(train, labels, test, penalty):
    mean = labels.mean()
    weights = np.linalg.solve(train.T @ train + penalty * np.eye(train.shape[1]), train.T @ (labels - mean))
    return test @ weights + mean


@needs_real
def test_real_sizes():
    data = read_ict_mmmo(REAL)
    assert [len(d) for d in (data.train, data.valid, data.test, data.unlabelled)] == [220, 40, 80, 220]
    assert len(data.cross_validation) == 120 and data.features == {"text": 300, "audio": 74, "visual": 36}
    assert set(data.test.labels.tolist()) <= {x / 2 for x in range(-4, 5)}
    assert data.train.lengths("audio").min() == 3 and data.test.lengths("text").max() == 20
    for split in (data.valid, data.test):
        assert torch.equal(split.lengths("text"), split.lengths("audio"))
        assert torch.equal(split.lengths("text"), split.lengths("visual"))
    ends = [s.values["text"][i].any() or s.values["audio"][i].any() for s in data.test for i in (0, -1)]
    assert all(ends)


@needs_real
def test_real_ridge_reaches_the_known_correlation():
    dataset = read_ict_mmmo(REAL).cross_validation
    predicted = {}
    for fold in folds(dataset, 5, seed=0):
        train = MultimodalDataset.concatenate([fold.train, fold.valid])
        standardiser = Standardiser().fit(train)
        x, z = (pooled(standardiser.transform(d)) for d in (train, fold.test))
        x, z = ((a - x.mean(0)) / (x.std(0) + 1e-9) for a in (x, z))
        guess = ridge(x, train.labels.double().numpy(), z, penalty=300.0)
        predicted |= dict(zip(fold.test.ids.tolist(), guess, strict=True))
    predictions = [predicted[i] for i in dataset.ids.tolist()]
    assert np.corrcoef(predictions, dataset.labels)[0, 1] > 0.45, "0.53 when written"
