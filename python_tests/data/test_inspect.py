import json
import math

import h5py
import numpy as np
import pytest
import torch

from mmfast.data import MultimodalData, MultimodalDataset, inspect, save
from mmfast.data.inspection import Found, Histogram
from mmfast.errors import UserError
from mmfast.files import to_json


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
    assert (train.samples, train.labelled) == (3, 2)
    assert train.labels.histogram == Histogram(-1, 2, (1, 0, 0, 1))
    assert (train.labels.low, train.labels.high) == pytest.approx((-1.2, 2.0))
    audio = train.modalities["audio"]
    assert audio.missing == pytest.approx(1 / 3) and (audio.nan, audio.inf) == (1, 1)
    assert (audio.shortest, audio.median, audio.longest) == (1, 1, 4) and audio.constant == (1,)
    assert audio.lengths == Histogram(1, 4, (1, 0, 0, 0, 0, 0, 0, 1))
    text = train.modalities["text"]
    assert (text.missing, text.shortest, text.median, text.longest) == (0, 1, 2, 3) and text.constant == ()


def test_text_names_everything(saved):
    text = str(inspect(saved))
    for part in (
        "mine",
        "regression in [-3, 3]",
        "padding      none, stored without",
        "train/audio/lengths",
        "train: 3 samples, 2 labelled",
        "labels -1.20 to 2.00, mean 0.40  -1 |█  █| +2 (1, 0, 0, 1)",
        "min / median / max  NaN  inf  constant features",
        "33.3%  |█      █|           1 / 1 / 4    1    1  1 (1)",
    ):
        assert part in text


def test_synthetic():
    report = inspect("synthetic")
    assert list(report.splits) == ["train", "valid", "test"] and report.contents == []
    assert report.splits["train"].modalities["audio"].constant == (73,)
    assert "train: 1,428 samples, 1,428 labelled" in str(report)


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
    assert "  text    300   100.0%                       0 / 0 / 0" in str(report)
    assert f"padding {report.padding}" in report.warnings


def test_unlabelled_data_has_no_label_line(tmp_path):
    save(MultimodalDataset({"text": [np.ones((1, 2))]}), tmp_path / "a.npz")
    report = inspect(tmp_path / "a.npz")
    assert math.isnan(report.splits["test"].labels.low) and "labels " not in str(report).split("test:")[1]


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
    assert (found.labels.outside, found.unaligned) == (Found(2, ("b", "d")), Found(2, ("b", "e")))
    assert (found.empty, found.blank) == (Found(1, ("c",)), Found(1, ("b",)))
    test = report.splits["test"]
    assert {test.labels.outside, test.unaligned, test.empty, test.blank} == {Found()}
    assert not report.aligned and report.misaligned == ("b", "e")
    for sentence in (
        "train: 2 samples (b, d) with a label outside [-3, 3], kept",
        "train: 2 samples (b, e) with modalities of different lengths, to be aligned unless the encoder takes them "
        "so",
        "train: 1 sample (c) without any modality",
        "train: 1 sample (b) with a modality that is 0 or no number throughout; what is missing has no steps",
        "train and test share 1 sample (twin) of equal contents: what is trained on is tested",
        "train and test share 1 group (z): a group on two sides",
    ):
        assert report.warnings.count(sentence) == 1, sentence
        assert sentence in " ".join(str(report).split())
    assert "aligned       no: modalities differ in length in 2 samples (b, e)" in str(report)


def dataset(n=6, seed=0, audio=3, visual=4, labels=None, **more):
    rng = np.random.default_rng(seed)
    values = {"audio": rng.normal(size=(n, 2, audio)), "visual": rng.normal(size=(n, 2, visual))}
    labels = rng.normal(size=n) if labels is None else labels
    more = {"ids": range(100 * seed, 100 * seed + n), "names": [f"{seed}/{i}" for i in range(n)], **more}
    return MultimodalDataset({m: list(v) for m, v in values.items()}, labels, **more)


def warnings_of(tmp_path, train, **more):
    save(MultimodalData(train, **more), tmp_path / "a.npz")
    return inspect(tmp_path / "a.npz").warnings


def test_clean_data_of_two_splits_are_warned_of_nothing(tmp_path):
    assert warnings_of(tmp_path, dataset(), test=dataset(seed=1)) == ()


@pytest.mark.parametrize("n", [2183, 2199])
def test_the_two_sizes_of_mosi_are_told(tmp_path, n):
    sentence = warnings_of(tmp_path, dataset(n, audio=1))[0]
    assert sentence.startswith(f"{n:,} samples are ") and "of other samples" in sentence


def test_modalities_that_look_swapped_are_told(tmp_path):
    sentence = warnings_of(tmp_path, dataset(audio=35, visual=74))[0]
    assert sentence.startswith("audio has 35 features and visual 74")
    assert "swapped" not in " ".join(warnings_of(tmp_path, dataset(audio=74, visual=35)))


def test_what_is_there_twice_or_always_the_same_is_told(tmp_path):
    train = dataset(names=list("aabcde"), labels=[1.0] * 6)
    train.flat("visual")[:2] = 0
    train.flat("visual")[6] = 0
    one = dataset(1, 9, ids=[7], names=["x"], labels=[1.0])
    again = dataset(1, 9, ids=[8], names=["x"], labels=[1.0])
    assert warnings_of(tmp_path, MultimodalDataset.concatenate([train, one, again])) == (
        "no split in the files: give --split",
        "train: 1 sample (a) with a modality that is 0 or no number throughout; what is missing has no steps",
        "train: all of 8 labelled samples have the label 1",
        "visual: 3 of 16 steps inside samples (18.8%) are 0 in every feature, such as an unknown word or a face not "
        "found",
        "train: 2 samples (a, x) with a name that another one has",
        "train: 1 sample (x) with contents that another one has",
    )


def test_a_split_of_one_class_is_told(tmp_path):
    train = dataset(labels=["happy", "sad"] * 3)
    found = warnings_of(tmp_path, train, test=dataset(2, 1, labels=["sad", "sad"]))
    assert found == ("test: all of 2 labelled samples are of one class, sad",)


def test_json_has_the_promised_keys_and_no_nan(saved):
    told = json.loads(to_json(inspect(saved).json()), parse_constant=lambda word: pytest.fail(word))
    top = "layout name task targets label_range aligned misaligned padding fingerprint warnings groups splits"
    assert set(told) == set(top.split())
    assert told["splits"]["train"] == {
        "samples": 3,
        "labelled": 2,
        "labels": {"min": pytest.approx(-1.2), "mean": pytest.approx(0.4), "max": 2.0},
        "modalities": {
            "text": {
                "features": 3,
                "missing": 0.0,
                "lengths": {"min": 1, "median": 2, "max": 3},
                "nan": 0,
                "inf": 0,
                "constant": [],
            },
            "audio": {
                "features": 2,
                "missing": pytest.approx(1 / 3),
                "lengths": {"min": 1, "median": 1, "max": 4},
                "nan": 1,
                "inf": 1,
                "constant": [1],
            },
        },
    }


@pytest.mark.parametrize("width", [100, 60, 50])
def test_lines_fit_into_the_terminal(width):
    report = inspect("synthetic")
    lines = report.text(width).splitlines()
    assert max(map(len, lines)) <= width
    assert report.text(100, bars=".:-=+*#@").isascii()


def test_names_do_not_steer_the_terminal(tmp_path):
    train = dataset(2, names=["a\x1b[2J", "b\nc"], labels=[9.0, 9.0])
    save(MultimodalData(train, label_range=(-3, 3)), tmp_path / "a.npz")
    text = str(inspect(tmp_path / "a.npz"))
    assert "\x1b" not in text and "2 samples (a\\x1b[2J, b\\nc)" in " ".join(text.split())
