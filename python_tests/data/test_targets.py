"""Targets of every kind: what labels may be given as, and that they stay what they are wherever samples go."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from mmfast.data import (
    MultimodalData,
    MultimodalDataset,
    Standardiser,
    collate,
    divide,
    folds,
    inspect,
    label_share,
    load,
    save,
    synthetic,
)
from mmfast.errors import UserError

NAN = math.nan
EMOTIONS = ("happy", "sad")


def dataset(labels, **options) -> MultimodalDataset:
    values = [
        np.full((2, 3), i, np.float32) + options.get("ids", np.zeros(100))[i] for i in range(len(labels))
    ]
    return MultimodalDataset({"text": values}, labels, **options)


def equal(a, b) -> bool:
    return torch.equal(
        torch.as_tensor(a, dtype=torch.float32).nan_to_num(99),
        torch.as_tensor(b, dtype=torch.float32).nan_to_num(99),
    )


@pytest.mark.parametrize(
    "labels", [["sad", None, "angry", "sad", ""], np.array(["sad", "", "angry", "sad", ""])]
)
def test_names_are_classes_in_sorted_order(labels):
    data = MultimodalData(dataset(labels))
    assert (data.task, data.targets, data.label_range) == ("classification", ("angry", "sad"), None)
    assert equal(data.train.labels, [1, NAN, 0, 1, NAN])
    assert data.train.labelled().tolist() == [True, False, True, True, False]


def test_splits_agree_on_the_classes_that_any_of_them_has():
    train, test = dataset(["b", "c"]), dataset(["a", "c"], ids=[10, 11])
    data = MultimodalData(train, test=test, unlabelled=dataset([NAN, NAN], ids=[20, 21]))
    assert data.targets == ("a", "b", "c")
    assert equal(data.train.labels, [1, 2]) and equal(data.test.labels, [0, 2])
    assert data.unlabelled.targets == data.targets and not data.unlabelled.labelled().any()
    both = MultimodalDataset.concatenate([train, test])
    assert both.targets == ("a", "b", "c") and equal(both.labels, [1, 2, 0, 2])


def test_targets_that_are_given_decide_the_order_of_the_classes():
    data = MultimodalData(dataset(["b", "c", None]), targets=["c", "x", "b"])
    assert data.task == "classification" and equal(data.train.labels, [2, 0, NAN])
    with pytest.raises(UserError, match="targets must be among b, c, got a"):
        MultimodalData(dataset(["b", "a"]), targets=["b", "c"])


def test_indices_of_classes_with_names_or_without():
    labels = np.array([0, 2, -1, 1])
    named = MultimodalData(dataset(labels), targets=["x", "y", "z"])
    assert (named.task, named.targets) == ("classification", ("x", "y", "z"))
    assert equal(named.train.labels, [0, 2, NAN, 1])
    plain = MultimodalData(dataset(labels), task="classification")
    assert plain.targets == ("0", "1", "2")
    # Numbers alone are numbers.
    assert MultimodalData(dataset(labels)).task == "regression"
    assert equal(MultimodalData(dataset(labels)).train.labels, labels)


@pytest.mark.parametrize("labels", [[[0, 1], [-1, 0], [0, 0]], np.array([[0, 1], [NAN, 0], [0, 0]])])
def test_columns_of_0_and_1(labels):
    data = MultimodalData(dataset(labels), task="multilabel", targets=EMOTIONS)
    assert data.targets == EMOTIONS and data.label_range is None
    assert equal(data.train.labels, [[0, 1], [NAN, 0], [0, 0]])
    assert data.train.labelled().all()
    assert data.valid.labels.shape == (0, 2)


def test_several_numbers():
    data = MultimodalData(
        dataset([[1, 2.5], [NAN, 4], [NAN, NAN]]), task="regression", targets=("valence", "arousal")
    )
    assert data.label_range == (1.0, 4.0) and data.train.labelled().tolist() == [True, True, False]
    assert MultimodalData(dataset([[1, 2.5]]), task="regression").targets == ("label0", "label1")
    one = MultimodalData(dataset([[1.0], [2.0]]), task="regression")
    assert one.train.labels.shape == (2,) and one.targets == ("label",)


@pytest.mark.parametrize(
    ("labels", "options", "sentence"),
    [
        ([[0, 1]], {}, r"task must be regression or multilabel, as labels \(N, 2\) may be either"),
        (
            [0, 2.5],
            {"task": "classification"},
            r"classes, whole numbers from 0 to 2, or -1 or NaN for none, got 2.5 in labels\[1\] of sample '1'",
        ),
        ([0, -2], {"task": "classification"}, "got -2 in"),
        (
            [0, 3],
            {"task": "classification", "targets": ["a", "b"]},
            "from 0 to 1, or -1 or NaN for none, got 3",
        ),
        (
            [[0, 2]],
            {"task": "multilabel"},
            r"labels must be 0 or 1, or -1 or NaN for none, got 2 in labels\[0\]\[1\]",
        ),
        (
            [[0, 1]],
            {"task": "multilabel", "targets": ["a", "b", "c"]},
            "labels must be 3 a sample, a, b, c, got the shape",
        ),
        ([[0, 1]], {"task": "classification"}, r"labels of classes must be \(N,\)"),
        (
            [0, 1],
            {"task": "ranking"},
            "task must be one of regression, classification, multilabel, got 'ranking'",
        ),
        ([0, 1], {"task": "classification", "label_range": (-3, 3)}, "label_range is for regression"),
        ([0, 1], {"targets": ["a", "a"]}, "targets must be names, each once"),
    ],
)
def test_labels_that_do_not_fit_the_task(labels, options, sentence):
    with pytest.raises(UserError, match=f"MultimodalData: .*{sentence}"):
        MultimodalData(dataset(labels), **options)


def test_splits_of_two_kinds_are_refused():
    with pytest.raises(UserError, match="labels must be of one kind in all data sets"):
        MultimodalData(dataset(["a", "b"]), test=dataset([0.5], ids=[7]))
    with pytest.raises(UserError, match="of one kind"):
        MultimodalDataset.concatenate([dataset([[0, 1]]), dataset([0.5], ids=[7])])


def test_a_task_is_overridden_where_the_labels_fit():
    classes = MultimodalData(dataset(["a", "c", "b", None]))
    numbers = classes.as_task("regression")
    assert (numbers.targets, numbers.label_range) == (("label",), (-3.0, 3.0)) and equal(
        numbers.train.labels, [0, 2, 1, NAN]
    )
    assert classes.as_task("classification") is classes
    assert MultimodalData(dataset([0, 1, 2.0])).as_task("classification").targets == ("0", "1", "2")
    sets = MultimodalData(dataset([[0, 1], [1, 1]]), task="multilabel", targets=EMOTIONS)
    assert sets.as_task("regression").targets == EMOTIONS
    assert sets.as_task("regression").as_task("multilabel").fingerprint() == sets.fingerprint()
    with pytest.raises(UserError, match=r"labels must be classes, .* got 0.5"):
        MultimodalData(dataset([0.5, 1])).as_task("classification")
    # Columns are found again by their names.
    assert equal(sets.as_task("multilabel", ["sad", "happy"]).train.labels, [[1, 0], [1, 1]])


@pytest.fixture(params=["multilabel", "classification", "several"])
def corpus(request) -> MultimodalData:
    task = "regression" if request.param == "several" else request.param
    made = synthetic(
        300,
        task="multilabel" if task == "regression" else task,
        max_length=5,
        features={"text": 4, "audio": 3},
        labelled=0.5,
    )
    return made.as_task(task)


def test_batches_subsets_and_standardised_copies_keep_targets(corpus):
    train = corpus.train
    part = train.subset(np.array([5, 3, 8]))
    batch = collate([part[i] for i in range(3)])
    assert equal(batch.labels, train.labels[[5, 3, 8]])
    assert batch.to("cpu").labels.shape == batch.labels.shape
    for other in (
        part,
        Standardiser().fit(train).transform(train),
        MultimodalDataset.concatenate([part, corpus.test]),
    ):
        assert (other.task, other.targets) == (corpus.task, corpus.targets)
    assert equal(Standardiser().fit(train).transform(corpus).train.labels, train.labels)


def test_files_keep_targets(corpus, tmp_path):
    save(corpus, tmp_path / "a.npz")
    back = load(tmp_path / "a.npz")
    assert (back.task, back.targets, back.label_range) == (corpus.task, corpus.targets, corpus.label_range)
    assert equal(back.train.labels, corpus.train.labels) and back.fingerprint() == corpus.fingerprint()


def test_files_of_names_and_of_the_first_form(tmp_path):
    arrays = {"format": "mmfast-data 1", "train/text/values": np.ones((2, 1)), "train/text/lengths": [1, 1]}
    np.savez(tmp_path / "names.npz", **arrays, **{"train/labels": np.array(["b", "a"])})
    data = load(tmp_path / "names.npz")
    assert data.targets == ("a", "b") and equal(data.train.labels, [1, 0])
    np.savez(tmp_path / "old.npz", **arrays, **{"train/labels": [0.5, 2.0]})
    assert load(tmp_path / "old.npz").task == "regression"
    np.savez(tmp_path / "odd.npz", **arrays, **{"train/labels": np.eye(2), "task": "classification"})
    with pytest.raises(UserError, match=r"odd.npz: MultimodalData: labels of classes must be \(N,\)"):
        load(tmp_path / "odd.npz")


def test_fingerprints_know_labels_task_and_targets(corpus):
    train, names = corpus.train, corpus.targets
    assert (
        MultimodalData(train.subset(np.arange(len(train))[::-1])).fingerprint()
        == MultimodalData(train).fingerprint()
    )
    seen = {MultimodalData(train).fingerprint(), MultimodalData(train.with_labels(None)).fingerprint()}
    if corpus.task == "classification":
        seen.add(
            MultimodalData(
                train.with_labels(train.labels), task="classification", targets=[*names[1:], names[0]]
            ).fingerprint()
        )
    else:
        flipped = train.labels.clone()
        flipped[0, 0] = 1 - flipped[0, 0].nan_to_num()
        seen.add(MultimodalData(train.with_labels(flipped), task=corpus.task, targets=names).fingerprint())
        seen.add(
            MultimodalData(
                train.with_labels(train.labels), task=corpus.task, targets=names[::-1]
            ).fingerprint()
        )
    assert len(seen) == (3 if corpus.task == "classification" else 4)


def shares(dataset: MultimodalDataset) -> np.ndarray:
    """Of each class or label, among what is labelled."""
    labels = dataset.labels[dataset.labelled()].numpy()
    there = labels == 1 if labels.ndim == 2 else labels[:, None] == np.arange(len(dataset.targets))
    return there.mean(0)


@pytest.mark.parametrize("task", ["multilabel", "classification"])
def test_random_splits_and_folds_keep_the_shares_of_classes_and_label_sets(task):
    made = synthetic(400, task=task, max_length=4, features={"text": 3})
    whole = MultimodalDataset.concatenate([made.train, made.valid, made.test])
    wanted, allowed = shares(whole), 0.02 if task == "classification" else 0.05
    split = divide(MultimodalData(whole), (0.6, 0.2, 0.2), seed=3)
    assert (split.task, split.targets) == (task, made.targets)
    for part in (split.train, split.valid, split.test):
        np.testing.assert_allclose(shares(part), wanted, atol=allowed)
    for fold in folds(whole, 4, seed=1):
        np.testing.assert_allclose(shares(fold.test), wanted, atol=allowed)
        np.testing.assert_allclose(shares(fold.train), wanted, atol=allowed)
    again = divide(MultimodalData(whole.subset(np.arange(400)[::-1])), (0.6, 0.2, 0.2), seed=3)
    assert set(again.test.ids.tolist()) == set(split.test.ids.tolist())
    assert set(divide(MultimodalData(whole), (0.6, 0.2, 0.2), seed=4).test.ids.tolist()) != set(
        split.test.ids.tolist()
    )


def test_groups_stay_together_where_classes_are_stratified():
    whole = synthetic(200, task="classification", max_length=3, features={"text": 3}).train
    groups = [f"speaker {i % 20}" for i in range(len(whole))]
    whole = MultimodalDataset.from_flat(
        {"text": whole.flat("text")}, {"text": whole.lengths("text")}, whole.labels, groups=groups
    ).as_task("classification", whole.targets)
    split = divide(MultimodalData(whole), (0.5, 0.2, 0.3))
    parts = [set(p.groups["group"]) for p in (split.train, split.valid, split.test)]
    assert all(parts) and sum(map(len, parts)) == 20
    for fold in folds(whole, 3):
        assert not set(fold.train.groups["group"]) & set(fold.test.groups["group"])


@pytest.mark.parametrize("task", ["multilabel", "classification"])
def test_a_share_of_labels_has_each_class_and_is_nested(task):
    train = synthetic(600, task=task, max_length=3, features={"text": 3}).train
    kept = [label_share(train, share, seed=5) for share in (0.015, 0.1, 0.5, 1.0)]
    assert [int(k.labelled().sum()) for k in kept] == [round(s * len(train)) for s in (0.015, 0.1, 0.5, 1.0)]
    for less, more in pairwise(kept):
        assert not (less.labelled() & ~more.labelled()).any()
    assert (shares(kept[0]) > 0).all()
    np.testing.assert_allclose(shares(kept[2]), shares(train), atol=0.03)
    assert kept[0].task == task and kept[0].targets == train.targets


def test_folds_of_several_numbers_follow_their_sum():
    labels = np.random.default_rng(0).normal(size=(100, 2)) * [1, 100]
    whole = MultimodalData(dataset(labels), task="regression").train
    for fold in folds(whole, 4):
        z = fold.test.labels.numpy() / labels.std(0)
        assert abs(z.sum(1).mean() - (labels / labels.std(0)).sum(1).mean()) < 0.1


def test_inspection_counts_classes_labels_empty_sets_and_what_is_unknown(tmp_path):
    labels = [[0, 1, 0], [NAN, 0, 0], [0, 0, 0], [1, 1, 0], [NAN] * 3]
    save(
        MultimodalData(dataset(labels), task="multilabel", targets=["happy", "sad", "angry"]),
        tmp_path / "a.npz",
    )
    found = inspect(tmp_path / "a.npz")
    report = found.splits["train"]
    told = report.labels
    assert (report.samples, report.labelled, told.without) == (5, 4, 2)
    assert told.counts == {"happy": 1, "sad": 2, "angry": 0} and told.unknown == {"happy": 1}
    assert math.isnan(told.mean) and told.outside.count == 0
    text = str(found)
    assert "multilabel of happy, sad, angry" in text and "2 without any label (50.0%)" in text
    assert "happy 1 (33.3%, 1 unknown), sad 2 (50.0%), angry 0 (0.0%)" in text
    save(MultimodalData(dataset(["b", "a", "b", None])), tmp_path / "b.npz")
    assert "a 1 (33.3%), b 2 (66.7%)" in str(inspect(tmp_path / "b.npz"))
    several = MultimodalData(
        dataset([[1, 2], [3, NAN]]), task="regression", targets=("valence", "arousal"), label_range=(1, 5)
    )
    save(several, tmp_path / "c.npz")
    text = str(inspect(tmp_path / "c.npz"))
    assert "regression of valence, arousal in [1, 5]" in text
    assert "valence  1.00 to 3.00, mean 2.00" in text and "arousal  2.00 to 2.00, mean 2.00" in text
    assert "unknown 1" in text


def test_synthetic_emotions_are_like_those_of_mosei():
    data = synthetic(3000, task="multilabel", max_length=3, features={"text": 2}, labelled=0.5)
    assert data.targets == ("happy", "sad", "angry", "fearful", "disgusted", "surprised")
    whole = MultimodalDataset.concatenate([data.train, data.valid, data.test])
    np.testing.assert_allclose(shares(whole), [0.46, 0.25, 0.20, 0.08, 0.17, 0.09], atol=0.03)
    known = whole.labels[whole.labelled()]
    assert abs(float((known.sum(1) == 0).float().mean()) - 1 / 3) < 0.03
    classes = synthetic(1000, task="classification", max_length=3, features={"text": 2})
    assert classes.targets == ("neutral", "happy", "sad", "angry") and (shares(classes.train) > 0.15).all()
    with pytest.raises(UserError, match="synthetic: task must be one of"):
        synthetic(100, task="emotions")


@pytest.mark.parametrize("task", ["multilabel", "classification", "regression"])
def test_empty_splits_have_no_labels_of_any_kind(task, tmp_path):
    full = synthetic(60, task=task, max_length=3, features={"text": 2})
    data = MultimodalData(full.train, task=task, targets=full.targets)
    assert len(label_share(data.valid, 0.5, seed=0)) == 0 and data.valid.fingerprint()
    save(data, tmp_path / "a.npz")
    assert load(tmp_path / "a.npz").fingerprint() == data.fingerprint()
