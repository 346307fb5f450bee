import math

import h5py
import numpy as np
import pytest
import torch

from mmfast.data import MultimodalData, MultimodalDataset, inspect, save
from mmfast.errors import UserError


@pytest.fixture
def saved(tmp_path):
    audio = [np.arange(8.0).reshape(4, 2), np.empty((0, 2)), np.ones((1, 2))]
    audio[0][:, 1] = 1.0
    audio[0][0, 0], audio[0][1, 0] = math.nan, -math.inf
    train = MultimodalDataset(
        {"audio": audio, "text": [np.eye(3)[: i + 1] for i in range(3)]}, labels=[-1.2, math.nan, 2.0]
    )
    path = tmp_path / "mine.npz"
    save(MultimodalData(train, unlabelled=train, name="mine"), path)
    return path


def test_report_of_a_saved_file(saved):
    report = inspect(saved)
    assert report.name == "mine" and report.label_range == (-3, 3)
    assert ("train/text/values", (6, 3), "float32") in report.contents
    assert list(report.splits) == ["train"], "a pool that is train is not told twice"
    train = report.splits["train"]
    assert (train.samples, train.labelled, train.histogram) == (3, 2, {-1: 1, 2: 1})
    assert (train.label_min, train.label_max) == pytest.approx((-1.2, 2.0))
    audio = train.modalities["audio"]
    assert audio.missing == pytest.approx(1 / 3) and (audio.nan, audio.inf) == (1, 1)
    assert (audio.shortest, audio.median, audio.longest) == (1, 1, 4) and audio.constant == (1,)
    text = train.modalities["text"]
    assert (text.missing, text.shortest, text.median, text.longest) == (0, 1, 2, 3) and text.constant == ()


def test_text_names_everything(saved):
    text = str(inspect(saved))
    for part in (
        "mine",
        "labels in [-3, 3]; padding none",
        "train/audio/lengths",
        "train: 3 samples, 2 labelled",
        "labels -1.20 to 2.00, mean 0.40; rounded -1: 1  +2: 1",
        "missing  33.3%",
        "length 1 / 1 / 4 (min / median / max)",
        "NaN 1  inf 1",
        "constant features 1 (1)",
    ):
        assert part in text


def test_synthetic():
    report = inspect("synthetic")
    assert list(report.splits) == ["train", "valid", "test"] and report.contents == []
    assert report.splits["train"].modalities["audio"].constant == (73,)
    assert "train: 1428 samples, 1428 labelled" in str(report)


def test_ict_mmmo_folder(tmp_path):
    for split in ("train", "valid", "test"):
        for name, size in (("text_{}_emb", 300), ("audio_{}", 74), ("video_{}", 36)):
            if (name, split) != ("text_{}_emb", "train"):
                array = np.random.default_rng(0).normal(size=(4, 5, size))
                array[0, :2] = 0
                with h5py.File(tmp_path / f"{name.format(split)}.h5", "w") as file:
                    file["d1"] = array
        with h5py.File(tmp_path / f"y_{split}.h5", "w") as file:
            file["d1"] = np.array([1, 2, 3, 5.0])
    report = inspect(tmp_path)
    assert list(report.splits) == ["train", "valid", "test", "cross_validation"]
    assert ("text_valid_emb.h5:d1", (4, 5, 300), "float64") in report.contents
    assert report.padding.startswith("in front of 3 and at the back of 0 of 12 samples")
    text = report.splits["train"].modalities["text"]
    assert (text.missing, text.longest, text.constant) == (1, 0, ())
    assert "missing 100.0%  length 0 / 0 / 0" in str(report)


def test_unlabelled_data_has_no_label_line(tmp_path):
    save(MultimodalDataset({"text": [np.ones((1, 2))]}), tmp_path / "a.npz")
    report = inspect(tmp_path / "a.npz")
    assert math.isnan(report.splits["test"].label_min) and "rounded" not in str(report)


def test_unknown_content_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("words")
    with pytest.raises(UserError, match="of no known kind"):
        inspect(tmp_path / "x.txt")


def test_faults_of_single_samples_are_counted_and_named(tmp_path):
    steps = {"text": [3, 4, 0, 2, 2], "audio": [3, 5, 0, 0, 1]}
    rng = np.random.default_rng(0)
    train = MultimodalDataset(
        {m: [rng.normal(size=(n, 2)) for n in lengths] for m, lengths in steps.items()},
        labels=[0.0, 3.5, math.nan, -9.0, 1.0],
        names=list("abcde"),
        groups=["x", "x", "y", "z", "z"],
    )
    train.flat("audio")[3:8] = torch.tensor([[math.nan, 0.0]])  # the five steps of b
    twin = MultimodalDataset(
        {m: [train[0].values[m]] for m in steps}, [0.0], ids=[9], names=["twin"], groups=["z"]
    )
    save(MultimodalData(train, test=twin, label_range=(-3, 3)), tmp_path / "a.npz")
    report = inspect(tmp_path / "a.npz")
    found = report.splits["train"]
    assert (found.outside, found.unaligned, found.empty) == (("b", "d"), ("b", "e"), ("c",))
    assert found.blank == ("b",)
    assert report.shared == {("train", "test"): ("twin",)}
    test = report.splits["test"]
    assert (test.outside, test.unaligned, test.empty, test.blank) == ((), (), (), ())
    text = str(report)
    for line in (
        "  2 samples (b, d) with a label outside [-3, 3]",
        "  2 samples (b, e) with modalities of different lengths, to be aligned unless the encoder takes them so",
        "  1 sample (c) without any modality",
        "  1 sample (b) with a modality that is 0 or no number throughout; what is missing has no steps",
        "train and test share 1 sample (twin) of equal contents",
        "train and test share 1 group (z)",
    ):
        assert text.count(line) == 1, line
