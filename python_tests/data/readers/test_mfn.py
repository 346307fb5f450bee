"""Folders of MFN: what the labels are, files that lack, columns beside one another, and what is wrong."""

import re

import h5py
import numpy as np
import pytest
from layouts import mfn as layout
from layouts.mfn import MOSI, save, sentiment, write

from mmfast.data import load
from mmfast.data.readers.mfn import contents
from mmfast.data.source import Source
from mmfast.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path, MOSI, sentiment)


def test_every_array_is_listed(folder):
    found = contents(Source(folder))
    assert found[0] == ("text_train_emb.h5:d1", (10, 5, 6), "float64") and len(found) == 12


def test_ratings_of_pom_one_at_a_time_and_outside(tmp_path):
    folder = write(tmp_path, MOSI, layout.ratings)
    low = layout.ratings("test")
    low[0, 3] = 2 / 3
    save(folder / "y_test.h5", low)
    data = load(folder)
    assert "1 labels lie outside [1, 7], such as 0.666667; kept as they are" in data.warnings
    one = load(folder, labels="3")
    assert one.test.labels.tolist() == data.test.labels[:, 3].tolist() and one.label_range == (1, 7)


def test_columns_are_divided_as_said(tmp_path):
    folder = layout.write_joint(tmp_path)
    with pytest.raises(
        UserError, match="data must have the 325 features of text:300,audio:5,visual:20, got 13"
    ):
        load(folder)
    assert load(folder, modalities="audio:10,text:3").features == {"text": 3, "audio": 10}
    for wrong in (
        "text:6,audio:x",
        "smell:13",
        "text:13,",
        "text:-13",
        "text:0,audio:13",
        "text:" + "9" * 5000,
    ):
        with pytest.raises(UserError, match=r"modalities must be as in|must have the"):
            load(folder, modalities=wrong)


def test_some_modalities_are_kept(folder):
    assert load(folder, modalities="visual,text").modalities == ("text", "visual")


def test_modalities_of_other_lengths_are_cut_each_by_itself(folder):
    save(folder / "audio_train.h5", np.ones((10, 9, 4)))
    data = load(folder)
    assert data.train.lengths("audio").tolist() == [9] * 10 and data.train.lengths("text").max() == 5


def test_a_split_without_labels_is_said(folder):
    (folder / "y_test.h5").unlink()
    data = load(folder)
    assert "test has no labels" in data.warnings and data.test.labels.isnan().all()


def other_file(folder, outside):
    outside.mkdir()
    save(outside / "canary.h5", np.full((10, 5, 4), 7.0))
    (folder / "audio_train.h5").unlink()


def external_link(folder, outside):
    other_file(folder, outside)
    with h5py.File(folder / "audio_train.h5", "w") as file:
        file["d1"] = h5py.ExternalLink(str(outside / "canary.h5"), "d1")


def symbolic_link(folder, outside):
    other_file(folder, outside)
    (folder / "audio_train.h5").symlink_to(outside / "canary.h5")


def second(folder, outside):
    with h5py.File(folder / "audio_train.h5", "r+") as file:
        file["d2"] = np.ones(3)


def huge(folder, outside):
    with h5py.File(folder / "audio_train.h5", "w") as file:
        file.create_dataset("d1", (10**6, 10**3, 10**3), "f8")


def only_labels(folder, outside):
    for path in folder.iterdir():
        if not path.name.startswith("y_"):
            path.unlink()


BAD = [
    (external_link, "audio_train.h5: d1 must lie in the file itself, got an external link"),
    (symbolic_link, "audio_train.h5: must stay inside its folder"),
    (second, "audio_train.h5: must hold d1 alone, found ['d1', 'd2']"),
    (huge, "audio_train.h5: d1 must hold at most 512.0 MiB"),
    (only_labels, "must hold features, got labels without features"),
    (lambda f, o: save(f / "y_train.h5", np.ones(9)), "y_train.h5: must have 10 rows as the features, got 9"),
    (
        lambda f, o: save(f / "y_train.h5", np.ones((10, 2))),
        "labels must have as many columns in every split",
    ),
    (lambda f, o: save(f / "y_train.h5", [b"a"] * 10), "y_train.h5: d1 must hold numbers, got dtype"),
    (lambda f, o: save(f / "y_train.h5", [True] * 10), "y_train.h5: d1 must hold numbers, got dtype bool"),
    (lambda f, o: save(f / "audio_train.h5", np.ones((9, 5, 4))), "of train must have N ="),
    (lambda f, o: save(f / "audio_train.h5", np.ones((10, 5))), "d1 must have shape (N, L, F), got (10, 5)"),
    (lambda f, o: save(f / "audio_train.h5", np.ones((10, 5, 3))), "features"),
]


@pytest.mark.parametrize(("damage", "message"), BAD)
def test_bad_files_give_one_sentence(folder, tmp_path, damage, message):
    damage(folder, tmp_path / "outside")
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
