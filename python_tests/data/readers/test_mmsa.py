"""MMSA's and MMSA-FET's files: what the rows of the layouts do not show."""

import hashlib
import re

import numpy as np
import pytest
from layouts.mmsa import APART, bert, ids, labels, texts
from layouts.mult import split_of
from padded_help import SIZES, Held, changed, clips, odd_values

from mmfast.data.options import Options
from mmfast.data.readers import mmsa, mult, published
from mmfast.errors import UserError


def made(apart: bool) -> dict:
    """Two steps of padding behind each sample but the first, or lengths."""
    found = {}
    for split, samples in clips(21, APART if apart else 6).items():
        steps = [len(c["text"]) for c in samples]
        longest = APART["text"] if apart else 6
        found[split] = {
            **split_of(samples, APART if apart else 6, "back"),
            "text_bert": bert(steps, longest),
            "regression_labels": labels(split),
            "classification_labels": [1] * len(samples),
            "id": ids(split),
            "raw_text": texts(split),
        }
        if apart:
            found[split]["audio_lengths"] = [len(c["audio"]) for c in samples]
            found[split]["vision_lengths"] = np.array([len(c["visual"]) for c in samples])
    return found


@pytest.fixture
def aligned():
    return made(apart=False)


@pytest.fixture
def apart():
    return made(apart=True)


def read(content, **options):
    return mmsa.read(Held(content), Options(**options))


def test_real_steps_are_where_the_mask_is_not_how_often(aligned):
    split = aligned["test"]
    split["text_bert"][0, 1] = [0, 1, 1, 0, 1, 1]
    data = read(aligned)
    where = [1, 2, 4, 5]
    for modality, key in (("text", "text"), ("audio", "audio"), ("visual", "vision")):
        assert np.array_equal(data.test[0].values[modality], split[key][0, where])
    assert data.test.tokens[0].tolist() == split["text_bert"][0, 0, where].tolist()
    assert (
        "test.text has steps that are not zero beyond its length or mask in 1 samples: cut" in data.warnings
    )


def test_text_of_another_length_than_its_tokens_is_cut_by_its_zeros(apart):
    for split, samples in clips(21, APART).items():
        apart[split]["text_bert"] = bert([3] * len(samples), 11)
    data = read(apart)
    assert data.test.lengths("text").tolist() == [len(c["text"]) for c in clips(21, APART)["test"]]
    assert data.test.tokens[0].tolist() == [101, 1000, 102]


def test_lengths_beyond_the_steps_are_clipped_and_counted(apart):
    apart["test"]["audio_lengths"] = [99, 2, 3]
    apart["test"]["audio"][1, 2:] = apart["test"]["audio"][2, 3:] = 0
    data = read(apart)
    assert data.test.lengths("audio").tolist() == [7, 2, 3]
    assert (
        "test.audio_lengths exceed the 7 steps in 1 samples, whose steps were cut before: clipped"
        in data.warnings
    )


def test_a_length_of_zero_is_missing_and_what_is_cut_is_counted(apart):
    apart["test"]["vision_lengths"] = [0, 1, 1]
    data = read(apart)
    assert data.test.lengths("visual").tolist() == [0, 1, 1]
    cut = "test.vision has steps that are not zero beyond its length or mask in 3 samples: cut"
    assert cut in data.warnings


def test_one_step_of_zeros_is_missing(apart):
    apart["test"]["vision_lengths"] = np.array([9, 1, 1])
    apart["test"]["vision"][1:] = 0
    data = read(apart)
    assert data.test.lengths("visual").tolist() == [9, 0, 0]
    assert "test.vision is zero at every step in 2 samples: missing there" in data.warnings


def test_lengths_count_from_the_side_without_zeros_in_most_samples(apart):
    for split, samples in clips(21, APART).items():
        apart[split] |= split_of(samples, APART, "front") | {
            "text_bert": apart[split]["text_bert"][:, :, ::-1]
        }
    apart["train"]["vision"][1, -1] = 0  # no face in the last step of one sample
    data = read(apart)
    for i, clip in enumerate(clips(21, APART)["test"]):
        for modality, values in clip.items():
            assert np.array_equal(data.test[i].values[modality], values)
    assert not any("beyond" in warning for warning in data.warnings)


def test_without_a_mask_a_pause_at_one_end_is_real_where_another_modality_shows_it(aligned):
    for entry in aligned.values():
        del entry["text_bert"]
    aligned["test"]["text"][0, -1] = 0
    data = read(aligned)
    assert data.test.lengths("text")[0] == 6 and data.test.tokens is None


def test_infinite_audio_is_kept(aligned):
    aligned["test"]["audio"][0, 0] = -np.inf
    assert np.isneginf(read(aligned).test[0].values["audio"][0]).all()


def test_labels_by_choice(apart):
    for split in SIZES:
        apart[split]["regression_labels"] = labels(split, "M", 1.0)
        for column in "TAV":
            apart[split][f"regression_labels_{column}"] = labels(split, column, 1.0).tolist()
    assert read(apart).label_range == (-1, 1) and read(apart).targets == ("label",)
    for column in "MTAV":
        assert np.array_equal(read(apart, labels=column).test.labels, labels("test", column, 1.0))
    data = read(apart, labels="all")
    assert data.targets == ("M", "T", "A", "V") and data.task == "regression"
    assert np.array_equal(data.test.labels[:, 1], labels("test", "T", 1.0))
    classes = read(apart, labels="classification")
    assert classes.targets == ("negative", "neutral", "positive") and classes.test.labels.tolist() == [
        1,
        1,
        1,
    ]


def test_classes_are_read_where_there_is_nothing_else_and_no_labels_are_none(aligned):
    for entry in aligned.values():
        del entry["regression_labels"]
    assert read(aligned).task == "classification"
    for entry in aligned.values():
        del entry["classification_labels"]
    data = read(aligned)
    assert not data.train.labelled().any() and "no labels in the file" in data.warnings


def test_labels_outside_the_range_are_kept_and_counted(aligned):
    aligned["test"]["regression_labels"] = [0, np.nan, 11 / 3]
    data = read(aligned)
    assert data.label_range == (-3, 3) and float(data.test.labels[2]) == np.float32(11 / 3)
    assert any("1 labels lie outside" in warning for warning in data.warnings)


def test_mmsa_is_told_from_mult(aligned):
    assert mmsa.recognises(Held(aligned)) and not mult.recognises(Held(aligned))
    assert not mmsa.recognises(Held({"train": {"labels": 1, "text": 2}}))
    for other in (None, [], {}, {"train": []}, {1: {}}, {"train": {2: 3}}):
        assert not mmsa.recognises(Held(other)) and not mult.recognises(Held(other))


WRONG = [
    ({"text_bert": np.zeros((3, 6))}, "x.pkl: valid.text_bert must be numbers (N, 3, L), got (3, 6)"),
    ({"text_bert": np.zeros((4, 3, 6))}, "x.pkl: valid.text_bert must have 3 rows as text, got 4"),
    (
        {"text_bert": np.full((3, 3, 6), 2)},
        "x.pkl: valid.text_bert must have a mask of 0 and 1 in its second row, got 2",
    ),
    (
        {"text_bert": np.full((3, 3, 6), [[-1.0] * 6, [1] * 6, [0] * 6])},
        "x.pkl: valid.text_bert must have ids of tokens in its first row, whole numbers from 0, got -1",
    ),
    ({"audio_lengths": [1, 2]}, "x.pkl: valid.audio_lengths must have 3 rows as text, got 2"),
    (
        {"audio_lengths": [1, 2, -3]},
        "x.pkl: valid.audio_lengths must be one whole number a sample, 0 or more, got -3",
    ),
    (
        {"audio_lengths": [1, 2, 2.5]},
        "x.pkl: valid.audio_lengths must be one whole number a sample, 0 or more, got 2.5",
    ),
    ({"regression_labels": [1.0] * 4}, "x.pkl: valid.regression_labels must have 3 rows as text, got 4"),
    (
        {"regression_labels": None},
        "x.pkl: valid must hold regression_labels, got classification_labels",
    ),
    ({"raw_text": ["a"]}, "x.pkl: valid.raw_text must have 3 rows as text, got 1"),
    ({"raw_text": [1, {}, 2]}, "x.pkl: valid.raw_text[1] must be text, got dict"),
    ({"audio": np.zeros((3, 7))}, "x.pkl: valid.audio must be (N, L, F), got (3, 7)"),
]


@pytest.mark.parametrize(("entries", "message"), WRONG)
def test_what_does_not_fit_is_refused_in_one_sentence(aligned, entries, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read(changed(aligned, "valid", **entries))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("emotions", "--labels must be one of M, T, A, V, classification, all, got 'emotions'"),
        ("T", "train must hold regression_labels_T, got regression_labels, classification_labels"),
    ],
)
def test_choices_that_are_none(aligned, choice, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read(aligned, labels=choice)


def test_classes_that_are_none(aligned):
    aligned["test"]["classification_labels"] = [0, 1, 3]
    with pytest.raises(UserError, match=r"test.classification_labels must be 0, 1 or 2, got 3"):
        read(aligned, labels="classification")


@pytest.mark.parametrize(
    "key", ["audio", "text_bert", "audio_lengths", "regression_labels", "classification_labels", "raw_text"]
)
def test_whatever_stands_there_nothing_but_a_sentence_is_raised(apart, key):
    for split in ("train", "test"):
        for value in odd_values(SIZES[split]):
            for choice in (None, "classification"):
                try:
                    read(changed(apart, split, **{key: value}), labels=choice)
                except UserError as error:
                    assert "\n" not in str(error) and str(error).startswith("x.pkl: ")


def test_corpora_are_known_by_their_sizes_and_published_files_by_their_hash(tmp_path, monkeypatch):
    assert (published.corpus([1, 2, 3]), published.corpus([1284, 229, 686])) == (None, "MOSI")
    path = tmp_path / "x.pkl"
    path.write_bytes(b"as published")
    assert published.told(path) == "SHA-256 unknown"
    monkeypatch.setitem(published.SHA256, hashlib.sha256(b"as published").hexdigest(), "MOSI/aligned.pkl")
    assert published.told(path) == "SHA-256 of MMSA's MOSI/aligned.pkl"
