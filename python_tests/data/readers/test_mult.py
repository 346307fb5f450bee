"""MulT's pickles: what the rows of the layouts do not show."""

import re

import numpy as np
import pytest
from layouts.mult import APART, segments, sentiment, split_of
from padded_help import SIZES, Held, bomb, changed, clips, odd_values

from mmfast.data.options import Options
from mmfast.data.readers import mult, tailor
from mmfast.errors import UserError


@pytest.fixture
def content():
    found = {}
    for split, samples in clips(7, 6).items():
        labels = sentiment(split)[:, None, None]
        found[split] = {**split_of(samples, 6, "front"), "labels": labels, "id": np.array(segments(split))}
    return found


def read(content, **options):
    return mult.read(Held(content), Options(**options))


@pytest.mark.parametrize(
    ("ids", "name", "groups"),
    [
        (np.array([[b"caf\xc3\xa9", b"1", b"2"]] * 3), "café[1,2]", {"video": ["café"] * 3}),
        (np.array([[b"caf\xe9", b"1", b"2"]] * 3), "café[1,2]", {"video": ["café"] * 3}),
        ([["v", 1.5, 2]] * 3, "v[1.5,2]", {"video": ["v"] * 3}),
        (np.array([["a"], ["b"], ["c"]]), "a", {}),
        (np.array(["a", "b", "c"], dtype=object), "a", {}),
        (["v[3]", "v[4]", "w[1]"], "v[3]", {"video": ["v", "v", "w"]}),
        (np.array([7, 8, 9]), "7", {}),
        (None, "valid/0", {}),
    ],
)
def test_ids_of_all_forms(content, ids, name, groups):
    data = read(changed(content, "valid", id=ids)).valid
    assert data.names[0] == name and data.groups == groups


def test_a_word_without_a_vector_at_the_end_is_real_where_another_modality_shows_it(content):
    content["test"]["text"][0, -1] = 0
    assert read(content).test.lengths("text")[0] == 6
    content["test"]["audio"][0, -1] = content["test"]["vision"][0, -1] = 0
    assert read(content).test.lengths("text")[0] == 5


def test_zeros_are_cut_in_each_modality_alone_where_steps_differ():
    found = {s: {**split_of(c, APART, "front"), "labels": sentiment(s)} for s, c in clips(8, APART).items()}
    found["test"]["text"][0, -1] = 0
    data = read(found).test
    assert [int(data.lengths(m)[0]) for m in ("text", "audio", "visual")] == [3, 7, 9]


def test_numbers_that_are_none_are_kept(content):
    content["test"]["audio"][0, -1] = [-np.inf, np.nan, np.inf]
    content["test"]["vision"] = content["test"]["vision"].astype(np.float64)
    content["test"]["vision"][0, -1] = 1e300
    sample = read(content).test[0].values
    assert np.array_equal(sample["audio"][-1], [-np.inf, np.nan, np.inf], equal_nan=True)
    assert np.isposinf(sample["visual"][-1]).all()


def test_a_modality_in_some_splits_only_is_missing_in_the_others(content):
    data = read(changed(content, "test", vision=None))
    assert data.test.lengths("visual").tolist() == [0, 0, 0] and data.features["visual"] == 2


def test_splits_have_several_names_and_what_is_none_is_told(content):
    content["dev"] = content.pop("valid")
    content["meta"] = {"made": "by hand"}
    data = read(content)
    assert len(data.valid) == 3
    assert "1 keys are no split and not read, such as meta" in data.warnings


@pytest.mark.parametrize(
    ("values", "task", "label_range"),
    [
        ([0, 1] * 4, "regression", (-3, 3)),
        (np.linspace(1, 7, 8), "regression", (-3, 7)),
        (np.linspace(1, 7, 8)[:, None] * [1, 1], "regression", (1, 7)),
        (np.eye(3)[[0, 1, 2, 0, 1, 2, 0, 1]], "classification", None),
        ([[x] for x in range(-3, 5)], "regression", (-3, 3)),
        (np.array([np.nan] * 4 + [1.0] * 4), "regression", (-3, 3)),
    ],
)
def test_labels_of_all_forms(content, values, task, label_range):
    train = changed(content, "train", labels=values)["train"]
    if np.ndim(values) == 2 and np.shape(values)[1] > 1:
        content = {"train": train}
    data = read({**content, "train": train})
    assert (data.task, data.label_range) == (task, label_range)
    assert np.isnan(data.train.labels[:4]).all() == bool(np.isnan(np.asarray(values)[:4]).all())


def test_labels_outside_the_range_are_kept_and_counted(content):
    data = read(content)
    assert float(data.train.labels.max()) == np.float32(10 / 3)
    assert any("1 labels lie outside [-3, 3]" in warning for warning in data.warnings)


def test_labels_of_two_values_are_classes_when_asked(content):
    for split, n in SIZES.items():
        content[split]["labels"] = np.where(np.arange(n) % 2, 1, -1)[:, None]
    data = read(content, labels="classification")
    assert data.task == "classification" and data.test.labels.tolist() == [0, 1, 0]
    assert read(content).test.labels.tolist() == [-1, 1, -1]


WRONG = [
    ({"labels": np.zeros((4, 1, 1))}, "x.pkl: valid.labels must have 3 rows as text, got 4"),
    ({"text": np.zeros((3, 50))}, "x.pkl: valid.text must be (N, L, F), got (3, 50)"),
    ({"text": np.ones((3, 6, 5))}, "x.pkl: valid.text must have 4 features as train.text, got 5"),
    ({"audio": np.ones((2, 6, 3))}, "x.pkl: valid.audio must have 3 rows as text, got 2"),
    ({"vision": np.array([["a"] * 6] * 3)}, "x.pkl: valid.vision must hold numbers, got an array of <U1"),
    ({"vision": np.ones((3, 0, 2))}, "x.pkl: valid.vision must have steps and features, got (3, 0, 2)"),
    ({"labels": None}, "x.pkl: valid must hold labels, got text, audio, vision, id"),
    ({"labels": np.array(["a"] * 3)}, "x.pkl: valid.labels must be numbers, got an array of <U1"),
    ({"labels": [bomb()] * 3}, "x.pkl: valid.labels[0] must be numbers, got list"),
    ({"labels": np.zeros((3, 2))}, "x.pkl: valid.labels must be (N, 1, 1) as train.labels, got (3, 2)"),
    ({"id": ["a"]}, "x.pkl: valid.id must have 3 rows as text, got 1"),
    ({"id": np.array([["a", "b"]] * 3)}, "x.pkl: valid.id[0] must be 1 or 3 strings as in all others, got 2"),
    ({"id": [None] * 3}, "x.pkl: valid.id[0] must be text, got NoneType"),
    ({"id": ["a" * 5000] * 3}, "x.pkl: valid.id[0] must have at most 1,000 characters, got 5,000"),
    ({"visual": np.ones((3, 6, 2))}, "x.pkl: valid must hold visual once, got vision and visual"),
]


@pytest.mark.parametrize(("entries", "message"), WRONG)
def test_what_does_not_fit_is_refused_in_one_sentence(content, entries, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read(changed(content, "valid", **entries))


def test_two_splits_of_one_kind_are_refused(content):
    content["dev"] = content["valid"]
    with pytest.raises(UserError, match=r"x.pkl: must hold one split valid, got valid and dev"):
        read(content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "emotions"}, "--labels must be classification or left out, got 'emotions'"),
        (
            {"labels": "classification"},
            "labels must be 0 and 1, or -1 and 1, for --labels classification, got -3",
        ),
    ],
)
def test_choices_that_are_none(content, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read(content, **options)


def test_labels_of_another_file_must_be_as_many(content, monkeypatch):
    emotions = {split: {"tgt": [[2, 4, 3]] * n} for split, n in SIZES.items()}
    monkeypatch.setattr(mult, "Source", lambda file: Held(emotions, file))
    data = read(content, labels_from="t.pt")
    assert data.targets == tailor.EMOTIONS and data.test.labels.tolist() == [[1, 0, 0, 0, 0, 0]] * 3
    emotions["test"]["tgt"] = [[2, 3]] * 4
    with pytest.raises(UserError, match=r"t.pt: test.tgt must have 3 rows as x.pkl has, got 4"):
        read(content, labels_from="t.pt")
    del emotions["test"]
    with pytest.raises(UserError, match=r"t.pt: test must hold tgt, the emotions of its samples, got none"):
        read(content, labels_from="t.pt")


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("key", ["text", "vision", "labels", "id"])
def test_whatever_stands_there_nothing_but_a_sentence_is_raised(content, split, key):
    outcomes = set()
    for value in odd_values(SIZES[split]):
        try:
            read(changed(content, split, **{key: value}))
            outcomes.add("read")
        except UserError as error:
            assert "\n" not in str(error) and str(error).startswith("x.pkl: ")
            outcomes.add("refused")
    assert "refused" in outcomes
