"""Fingerprints tell the same samples from other ones, however they come."""

import time

import h5py
import numpy as np
import pytest
import torch

from mmfast.data import (
    MultimodalData,
    MultimodalDataset,
    Standardiser,
    folds,
    label_share,
    load,
    save,
    synthetic,
)

FEATURES = {"text": 5, "audio": 4, "visual": 3}
ICT_MMMO = {"text": 300, "audio": 74, "visual": 36}
FILES = {"text": "text_{}_emb.h5", "audio": "audio_{}.h5", "visual": "video_{}.h5"}


@pytest.fixture
def corpus():
    return synthetic(40, max_length=6, features=FEATURES)


def same_samples(dataset):
    """The samples of a data set, last first, in other types, with other names and ids, modalities turned round."""
    back = torch.arange(len(dataset)).flip(0).tolist()
    values = {
        m: [dataset[i].values[m].double().t().contiguous().t() for i in back]
        for m in reversed(dataset.modalities)
    }
    ids = [100 + i for i in back]
    return MultimodalDataset(values, dataset.labels[back], ids, [f"another {i}" for i in back])


def test_order_names_ids_types_and_layout_do_not_matter(corpus):
    ours, theirs = corpus.train, same_samples(corpus.train)
    assert ours.fingerprints().dtype == torch.int64 and len(ours.fingerprints().unique()) == len(ours)
    assert torch.equal(theirs.fingerprints().flip(0), ours.fingerprints())
    assert theirs.fingerprint() == ours.fingerprint()


def test_one_zero_and_one_nan():
    cells = torch.tensor([[0.0, float("nan"), 1.0]])
    other = torch.tensor([[-0.0, 0.0, 1.0]])
    other[0, 1].view(torch.int32).fill_(-1)  # a NaN of another payload and sign
    assert torch.isnan(other[0, 1]) and not torch.equal(cells.view(torch.int32), other.view(torch.int32))
    a, b = (MultimodalDataset({"text": [c]}, labels=[z]) for c, z in ((cells, 0.0), (other, -0.0)))
    assert torch.equal(a.fingerprints(), b.fingerprints()) and a.fingerprint() == b.fingerprint()


@pytest.mark.parametrize("change", ["cell", "boundary", "modality", "missing"])
def test_any_change_of_a_sample_shows_and_only_there(change):
    values = {"text": [np.ones((2, 3)), np.ones((4, 3))], "audio": [np.ones((2, 3)), np.zeros((0, 3))]}
    before = MultimodalDataset(values)
    if change == "cell":
        values["text"][1] = np.ones((4, 3)) + np.eye(4, 3) * 1e-6
    elif change == "boundary":  # the same numbers, cut into other steps
        values = {m: [a.reshape(-1, 1) for a in v] for m, v in values.items()}
    elif change == "modality":  # the same numbers under the other name
        values["text"][1], values["audio"][1] = values["audio"][1], values["text"][1]
    else:
        values["audio"][0] = np.zeros((0, 3))
    after = MultimodalDataset(values)
    changed = (before.fingerprints() != after.fingerprints()).tolist()
    assert changed == {"boundary": [True, True], "missing": [True, False]}.get(change, [False, True])
    assert before.fingerprint() != after.fingerprint()


def test_labels_count_for_the_data_but_not_for_the_samples(corpus):
    relabelled = corpus.train.with_labels(corpus.train.labels.roll(1))
    assert torch.equal(relabelled.fingerprints(), corpus.train.fingerprints())
    assert relabelled.fingerprint() != corpus.train.fingerprint()


def test_they_are_those_of_the_raw_values_through_every_step(corpus):
    raw = dict(zip(corpus.train.ids.tolist(), corpus.train.fingerprints().tolist(), strict=True))
    fresh = synthetic(40, max_length=6, features=FEATURES).train  # nothing computed yet
    standardised = Standardiser().fit(fresh).transform(fresh)
    steps = {
        "standardised": standardised,
        "subset": standardised.subset(torch.arange(len(fresh)).flip(0)[:5]),
        "fold": next(folds(standardised, 3)).train,
        "fewer labels": label_share(standardised, 0.5, 0),
        "joined": MultimodalDataset.concatenate([standardised.subset([3, 1]), fresh.subset([2])]),
        "subset, then standardised": Standardiser().fit(fresh).transform(fresh.subset([4, 0])),
    }
    for name, dataset in steps.items():
        wanted = [raw[i] for i in dataset.ids.tolist()]
        assert dataset.fingerprints().tolist() == wanted, name


def test_a_saved_copy_under_another_name_is_the_same_data(corpus, tmp_path):
    save(corpus, tmp_path / "b.npz")
    again = load(tmp_path / "b.npz")
    assert again.fingerprint() == corpus.fingerprint()
    again.name = "something else"
    again.train, again.test = again.train.subset(range(len(again.train))[::-1]), again.test
    assert again.fingerprint() == corpus.fingerprint()


def test_a_file_of_the_same_shapes_with_other_contents_is_other_data(corpus, tmp_path):
    file = tmp_path / "a.npz"
    save(corpus, file)
    before = load(file).fingerprint()
    other = MultimodalData(
        *(d.map(lambda m, x: x.roll(1, 1)) for d in (corpus.train, corpus.valid, corpus.test))
    )
    save(other, file)
    assert load(file).fingerprint() != before


def test_moving_a_sample_or_the_range_of_labels_shows(corpus):
    train, valid, test = corpus.train, corpus.valid, corpus.test
    both = MultimodalDataset.concatenate([valid, test])
    moved = MultimodalData(
        train, both.subset(range(len(valid) - 1)), both.subset(range(len(valid) - 1, len(both)))
    )
    assert moved.fingerprint() != corpus.fingerprint()
    assert MultimodalData(train, valid, test, label_range=(-1, 1)).fingerprint() != corpus.fingerprint()


def test_a_folder_of_hdf5_and_its_npz_are_the_same_data(tmp_path):
    rng = np.random.default_rng(0)
    for split, n in {"train": 4, "valid": 3, "test": 2}.items():
        for modality, pattern in FILES.items():
            array = rng.normal(size=(n, 6, ICT_MMMO[modality]))
            array[0, :2] = 0
            with h5py.File(tmp_path / pattern.format(split), "w") as file:
                file["d1"] = array
        with h5py.File(tmp_path / f"y_{split}.h5", "w") as file:
            file["d1"] = np.arange(n) + 1.5
    folder = load(tmp_path)
    save(folder, tmp_path / "copy.npz")
    assert load(tmp_path / "copy.npz").fingerprint() == folder.fingerprint()
    assert load(tmp_path / "copy.npz").test.among(folder.test.fingerprints()).all()


def test_overlap_is_found_and_samples_without_any_step_are_no_overlap(corpus):
    other = MultimodalDataset.concatenate([corpus.test, same_samples(corpus.train.subset([2, 5]))])
    seen = other.among(corpus.train.fingerprints())
    assert seen.tolist() == [False] * len(corpus.test) + [True] * 2
    nothing = MultimodalDataset({m: [np.zeros((0, f))] * 2 for m, f in FEATURES.items()})
    assert nothing.fingerprints().tolist() == [0, 0]
    assert not nothing.among(nothing.fingerprints()).any()
    empty = MultimodalDataset.empty(FEATURES)
    assert empty.fingerprints().shape == empty.among(corpus.train.fingerprints()).shape == (0,)


def test_it_is_fast_and_done_once():
    train = synthetic(2000, features={"text": 300, "audio": 74, "visual": 35}).train
    began = time.perf_counter()
    first = train.fingerprints()
    assert time.perf_counter() - began < 2  # 0.15 s on a quiet machine
    assert train.fingerprints() is first


def test_real_corpus_in_two_formats(shared, tmp_path):
    folder = load(shared / "data" / "ict_mmmo")
    save(folder, tmp_path / "copy.npz")
    again = load(tmp_path / "copy.npz")
    assert again.fingerprint() == folder.fingerprint()
    fold = next(folds(folder.cross_validation))
    seen = again.cross_validation.among(fold.train.fingerprints())
    assert int(seen.sum()) == len(fold.train) and not fold.test.among(fold.train.fingerprints()).any()
