import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.data import MultimodalDataset, folds, label_share
from mmfast.errors import UserError


def dataset(n, labels=None):
    labels = np.random.default_rng(0).integers(-2, 3, n) if labels is None else labels
    return MultimodalDataset({"text": [np.ones((1, 2))] * n}, labels=labels)


def kept(data):
    return set(torch.nonzero(~torch.isnan(data.labels)).flatten().tolist())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000))
def test_label_share_is_exact_nested_and_seeded(n, share, other, seed):
    data = dataset(n)
    low, high = sorted((share, other))
    small, large = label_share(data, low, seed), label_share(data, high, seed)
    assert len(kept(small)) == round(low * n)
    assert kept(small) <= kept(large)
    assert kept(label_share(data, low, seed)) == kept(small)
    rows = list(kept(small))
    assert torch.equal(small.labels[rows], data.labels[rows])
    assert kept(data) == set(range(n))


def test_label_share_counts_labelled_samples_only():
    data = dataset(10, [1.0] * 6 + [math.nan] * 4)
    assert len(kept(label_share(data, 0.5, 0))) == 3 and kept(label_share(data, 1, 0)) == set(range(6))


def test_label_share_depends_on_the_seed():
    data = dataset(100)
    assert kept(label_share(data, 0.2, 0)) != kept(label_share(data, 0.2, 1))


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_label_share_names_a_bad_share(share):
    with pytest.raises(UserError, match=r"label_share: share must lie in \[0, 1\]"):
        label_share(dataset(4), share, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 90), st.integers(2, 8), st.integers(0, 100), st.floats(0.05, 0.9))
def test_folds_test_each_sample_once_and_never_train_on_it(n, n_folds, seed, valid_share):
    if n_folds > n or n - -(-n // n_folds) < 2:
        return
    data = dataset(n)
    tested = []
    for fold in folds(data, n_folds, seed, valid_share):
        parts = [set(part.ids.tolist()) for part in fold]
        assert all(parts) and sum(map(len, parts)) == n and set().union(*parts) == set(range(n))
        rest = n - len(parts[2])
        assert len(parts[1]) == min(max(round(valid_share * rest), 1), rest - 1)
        assert len(parts[2]) in (n // n_folds, -(-n // n_folds))
        tested += sorted(parts[2])
    assert sorted(tested) == list(range(n))


def test_folds_follow_the_label_distribution():
    labels = np.random.default_rng(1).normal(size=120)
    for fold in folds(dataset(120, labels), 5, seed=3):
        for part in (fold.valid, fold.test):
            assert abs(part.labels.mean() - labels.mean()) < 0.15
            assert abs(part.labels.std() - labels.std()) < 0.2


def test_folds_are_seeded():
    def tests(seed):
        return [fold.test.ids.tolist() for fold in folds(dataset(40), 4, seed)]

    assert tests(0) == tests(0) != tests(1)


@pytest.mark.parametrize(
    ("n", "arguments", "message"),
    [
        (10, dict(n_folds=1), r"n_folds must lie in \[2, samples = 10\]"),
        (10, dict(n_folds=11), r"n_folds must lie in \[2, samples = 10\]"),
        (2, dict(n_folds=2), "leave two for train and valid, got 2"),
        (10, dict(valid_share=1.0), r"valid_share must lie in \(0, 1\), got 1.0"),
    ],
)
def test_folds_name_bad_sizes_at_the_call(n, arguments, message):
    with pytest.raises(UserError, match=f"folds: .*{message}"):
        folds(dataset(n), **arguments)


def test_folds_need_labels():
    with pytest.raises(UserError, match="every sample must have a label, 1 of 3 have none"):
        folds(dataset(3, [1.0, math.nan, 2.0]), 2)
