import errno
import math
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfast.data import MultimodalData, MultimodalDataset, load, save
from mmfast.data.readers.npz import read_saved
from mmfast.errors import UserError


def dataset(lengths, first_id=0):
    rng = np.random.default_rng(first_id)
    return MultimodalDataset(
        {m: [rng.normal(size=(n, f)) for n in lengths] for m, f in {"text": 3, "pose": 2}.items()},
        labels=[math.nan, *rng.normal(size=len(lengths) - 1)],
        ids=np.arange(first_id, first_id + len(lengths)),
        names=[f"café-{i}" for i in range(len(lengths))],
    )


@pytest.fixture
def data():
    train, test = dataset([2, 0, 5]), dataset([1, 3], first_id=10)
    train.flat("text")[0, 0], train.flat("pose")[1, 1] = math.nan, -math.inf
    return MultimodalData(
        train, test=test, unlabelled=train, cross_validation=test.subset([1]), name="mine", label_range=(0, 5)
    )


def minimal():
    return {
        "format": np.array("mmfast-data 1"),
        "test/text/values": np.ones((3, 4)),
        "test/text/lengths": np.array([1, 2]),
    }


def assert_same(a, b):
    assert a.features == b.features and a.names == b.names and torch.equal(a.ids, b.ids)
    assert torch.equal(a.labels.nan_to_num(99), b.labels.nan_to_num(99))
    for modality in a.modalities:
        assert torch.equal(a.lengths(modality), b.lengths(modality))
        assert np.array_equal(a.flat(modality), b.flat(modality), equal_nan=True)


def test_round_trip(data, tmp_path):
    path = tmp_path / "mine.npz"
    save(data, path)
    back = load(path)
    assert (back.name, back.label_range) == ("mine", (0.0, 5.0))
    for split in ("train", "valid", "test", "cross_validation"):
        assert_same(getattr(back, split), getattr(data, split))
    assert back.unlabelled is back.train and len(back.pretraining()) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["mine.npz"]


def test_a_lone_data_set_is_saved_as_test(tmp_path):
    part = dataset([2, 1, 4]).subset([2, 0])
    save(part, tmp_path / "one.npz")
    assert_same(load(str(tmp_path / "one.npz")).test, part)


def test_hand_written_minimal_file(tmp_path):
    np.savez_compressed(
        tmp_path / "bare.npz",
        **minimal(),
        **{"train/text/values": np.ones((1, 4))} | {"train/text/lengths": [1]},
    )
    data = load(tmp_path / "bare.npz")
    assert data.name == "bare" and data.label_range == (-3, 3)
    assert torch.isnan(data.test.labels).all() and data.test.lengths("text").tolist() == [1, 2]
    assert sorted([*data.test.ids.tolist(), *data.train.ids.tolist()]) == [0, 1, 2], (
        "numbered through the file"
    )


BAD = [
    ({"format": np.array("mmfast-data 9")}, "format must be 'mmfast-data 1', got 'mmfast-data 9'"),
    (
        {"test/text/lengths": None},
        "test must have values and lengths of the same modalities, got ['text'] and []",
    ),
    ({"test/text/lengths": np.array([1, 1])}, "must add up to the 3 steps of its values, got 2"),
    ({"test/text/lengths": np.array([4, -1])}, "must be 0 or more, got -1"),
    ({"test/text/lengths": np.array([1.0, 2.0])}, "must be (N,) integers, got float64"),
    ({"test/text/values": np.ones(3)}, "must be (n, F), got shape (3,)"),
    ({"test/text/values": np.array([["a"]] * 3)}, "must hold numbers, got dtype <U1"),
    ({"test/labels": np.ones(5)}, "labels must be (2,) or (2, K), got shape (5,)"),
    ({"test/labels": np.array([1, np.inf])}, "labels must be finite"),
    ({"test/ids": np.array([1, 1])}, "ids must be unique, got 1 twice"),
    ({"test/names": np.array(["a"])}, "names must be 2 strings"),
    ({"test/labels": np.array([None, {}])}, "test/labels must hold numbers or text, got objects"),
    ({"dev/text/values": np.ones((3, 4))}, "got 'dev/text/values'"),
    (
        {"stray": np.ones(3)},
        "keys must be name, task, targets, label_range, sample_rate, protocol, SPLIT/labels",
    ),
    ({"label_range": np.array([3, -3])}, "label_range must be two increasing numbers"),
    ({"label_range": np.array([3])}, "label_range must be two increasing numbers"),
    ({"test/text/values": None, "test/text/lengths": None}, "at least one split must be given"),
    (
        {"test/text/values": None, "test/text/lengths": None, "test/ids": np.arange(2)},
        "at least one modality",
    ),
    (
        {
            "train/text/values": np.ones((1, 4)),
            "train/text/lengths": [1],
            "train/ids": [1],
            "test/ids": [1, 2],
        },
        "ids must be unique over the splits",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_files_give_one_sentence(tmp_path, change, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **{k: v for k, v in (minimal() | change).items() if v is not None})
    with pytest.raises(UserError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_files(tmp_path):
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "words.npz").write_text("hello")
    for name, message in (
        ("none.npz", "no such file"),
        ("array.npy", "not a readable"),
        ("words.npz", "not a"),
    ):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            read_saved(tmp_path / name)


def test_damage_anywhere_is_a_user_error_or_harmless(data, tmp_path):
    path = tmp_path / "data.npz"
    save(data, path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(300):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            damaged = damaged[: rng.integers(len(whole))]
        else:
            damaged[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            back = load(path)
        except UserError:
            refused += 1
        else:
            assert_same(back.train, data.train)
    assert refused > 100


def test_a_full_disk_keeps_the_old_file(data, tmp_path, monkeypatch):
    path = tmp_path / "data.npz"
    save(data, path)
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=r"save: .*data.npz cannot be written \(No space left on device\)"):
        save(data, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["data.npz"]


@pytest.mark.parametrize("target", ["", "absent/data.npz"])
def test_impossible_targets_are_named(data, tmp_path, target):
    with pytest.raises(UserError, match=r"save: .* cannot be written"):
        save(data, tmp_path / target)


@pytest.mark.parametrize("name", ["a/b", "/", "a\nb", "a\0b", "\ud800"])
def test_a_modality_that_could_not_be_read_back_is_refused(name, tmp_path):
    lone = MultimodalDataset({name: [np.ones((1, 2))]})
    with pytest.raises(UserError, match="save: a modality must be named without / and control characters"):
        save(lone, tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", [".", "..", "labels", "ids", "names", "values", "x.npy", "a b", "Gesicht ü", "a\\b"]
)
def test_unusual_modalities_come_back(name, tmp_path):
    values = {"text": [np.ones((2, 2))], name: [np.zeros((2, 3))]}
    save(MultimodalData(MultimodalDataset(values, [1.0], names=["n"])), tmp_path / "a.npz")
    again = read_saved(tmp_path / "a.npz").train
    assert again.features == {"text": 2, name: 3} and again.names == ["n"] and again.labels.tolist() == [1]


@pytest.mark.parametrize("name", ["", 1, None])
def test_a_modality_without_a_name_is_refused(name):
    with pytest.raises(UserError, match=f"a modality must have a name, got {name!r}"):
        MultimodalDataset({name: [np.ones((1, 2))]})


def test_data_that_would_be_an_empty_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="save: data must hold at least one sample, got none"):
        save(MultimodalDataset.empty({"text": 2}), tmp_path / "a.npz")


def test_data_for_cross_validation_alone_come_back(data, tmp_path):
    save(MultimodalData(cross_validation=data.train, label_range=(-4, 4)), tmp_path / "a.npz")
    again = read_saved(tmp_path / "a.npz")
    assert again.cross_validation.fingerprint() == data.train.fingerprint() and len(again.train) == 0
    assert again.features == data.features and again.label_range == (-4, 4)


def test_groups_come_back_and_stay_with_their_samples(data, tmp_path):
    values = {"text": [np.full((1, 2), i) for i in range(3)]}
    train = MultimodalDataset(values, groups=["a", "b", "a"])
    other = MultimodalDataset(values, ids=[7, 8, 9])
    save(MultimodalData(train, test=other), tmp_path / "a.npz")
    again = read_saved(tmp_path / "a.npz")
    assert again.train.groups == {"group": ["a", "b", "a"]} and again.test.groups == {}
    assert (
        again.train.subset([2, 1]).groups
        == again.train.map(lambda m, x: x).subset([2, 1]).groups
        == {"group": ["a", "b"]}
    )
    joined = MultimodalDataset.concatenate([again.train, again.test])
    assert joined.groups["group"] == ["a", "b", "a", "sample 7", "sample 8", "sample 9"]
    with pytest.raises(UserError, match="groups must be 3 strings, one per sample, got 1"):
        MultimodalDataset(values, groups=["a"])


def test_nothing_is_pickled(data, tmp_path):
    path = Path(tmp_path / "data.npz")
    save(data, path)
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            assert b"|O" not in archive.read(name)[:128]


def test_words_and_transcripts_stay(tmp_path):
    given = MultimodalDataset(
        {"audio": [np.ones((2, 3)), np.ones((1, 3))]},
        words=[["naïve", "sp"], []],
        transcripts=["naïve.", ""],
    )
    save(MultimodalData(train=given), tmp_path / "a.npz")
    read = load(tmp_path / "a.npz").train
    assert (list(read.words), list(read.transcripts)) == ([["naïve", "sp"], []], ["naïve.", ""])
