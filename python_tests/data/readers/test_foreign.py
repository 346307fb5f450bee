"""Keys that say what arrays are: what is known of them, lengths on either side, and what is wrong."""

import re

import h5py
import numpy as np
import pytest
from layouts.foreign import keyed, npz, padded

from mmfast.data import load
from mmfast.errors import UserError


def test_unknown_keys_are_said_and_left_out(tmp_path):
    data = load(npz(tmp_path, keyed("/") | {"train/glasses": np.ones(9), "seed": np.array(3)}))
    assert "unknown keys, left out: seed, train/glasses" in data.warnings and len(data.train) == 9


def test_lengths_larger_than_the_array_are_all_of_it_and_counted(tmp_path):
    content = keyed("_", lengths=True)
    content["train_text_lengths"] = np.full(9, 99)
    data = load(npz(tmp_path, content))
    assert data.train.lengths("text").tolist() == [4] * 9
    assert "9 lengths are larger than the steps of their arrays, taken for all of them" in data.warnings


@pytest.mark.parametrize("front", [True, False])
def test_lengths_count_from_the_side_that_is_not_padded(tmp_path, front):
    array, counts = padded("train", "text"), np.array([1 + i % 4 for i in range(9)])
    array[2, 0] = 0  # zeros inside are real
    array = array[:, ::-1] if front else array
    content = {"text": array, "labels": np.arange(9.0) / 4, "lengths": counts}
    data = load(npz(tmp_path, content))
    assert data.train.lengths("text").tolist() == counts.tolist()
    want = array[2, -3:] if front else array[2, :3]
    assert np.array_equal(data.train[2].values["text"], want.astype("f4"))


def test_ids_name_the_samples(tmp_path):
    ids = np.array([[f"v{i}", str(i), "2"] for i in range(9)])
    data = load(npz(tmp_path, {"text": padded("train", "text"), "labels": np.arange(9.0) / 4, "ids": ids}))
    assert data.train.names[:2] == ["v0,0,2", "v1,1,2"]


def test_rows_of_one_one_are_classes(tmp_path):
    content = {"text": padded("train", "text"), "y": np.eye(3)[np.arange(9) % 3]}
    data = load(npz(tmp_path, content))
    assert data.task == "classification" and data.targets == ("class 0", "class 1", "class 2")


TEXT = padded("train", "text")
GOOD = {"text": TEXT, "labels": np.arange(9.0) / 4}
BAD = [
    (
        {"train/text/values": TEXT[0], "text": TEXT, "labels": np.ones(9)},
        'format is missing; write "mmfast-data 1"',
    ),
    (GOOD | {"glove": TEXT}, "must be there once"),
    (GOOD | {"text": TEXT[0]}, "text must be (N, L, F) numbers, got (4, 3)"),
    (GOOD | {"text": TEXT.astype("U")}, "text must be (N, L, F) numbers"),
    (GOOD | {"audio": TEXT[:8]}, "must have 9 samples as text, got 8"),
    (GOOD | {"labels": np.ones(8)}, "labels of all must have 9 rows as its features, got (8,)"),
    (GOOD | {"labels": np.array(1.0)}, "labels of all must have 9 rows"),
    (GOOD | {"labels": np.ones((9, 2, 2))}, "labels must be (N,), (N, 1), (N, 1, 1) or (N, K)"),
    (GOOD | {"lengths": np.full(9, -1)}, "lengths must be 9 whole numbers, one per sample"),
    (GOOD | {"lengths": np.full(9, 0.5)}, "lengths must be 9 whole numbers, one per sample"),
    (GOOD | {"lengths": np.array(["a"] * 9)}, "lengths must be 9 whole numbers, one per sample"),
    (GOOD | {"lengths": np.array(3)}, "lengths must be 9 whole numbers, one per sample"),
    (GOOD | {"names": np.array(["a"] * 8)}, "names must have 9 rows, one per sample, got (8,)"),
    ({"text": TEXT}, "is of no known kind: found an archive with text"),
    ({"labels": np.ones(9)}, "is of no known kind: found an archive with labels"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_bad_arrays_give_one_sentence(tmp_path, content, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(npz(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_links_in_a_file_are_told_of(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["train/text"], file["train/labels"] = TEXT, np.ones(9)
        file["test/text"] = h5py.ExternalLink("other.h5", "text")
    with pytest.raises(UserError, match="test/text must lie in the file itself, got an external link"):
        load(tmp_path / "x.h5")
