import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from mmfast.data import Standardiser, count_nonfinite, synthetic
from mmfast.errors import UserError

SMALL = {"text": 12, "audio": 8, "visual": 6}


@pytest.fixture(scope="module")
def corpus():
    return synthetic()


def means(dataset, weights=None):
    """(N, sum F) mean over the real steps, optionally weighted by a function of the position in [-1, 1]."""
    columns = []
    for modality in dataset.modalities:
        lengths, steps = dataset.lengths(modality), dataset.flat(modality)
        if weights is not None:
            steps = steps * torch.cat([weights(torch.linspace(-1, 1, n)) for n in lengths.tolist()])[:, None]
        sums = torch.zeros(len(dataset), steps.shape[1])
        sums.index_add_(0, torch.repeat_interleave(torch.arange(len(dataset)), lengths), steps)
        columns.append(sums / lengths.clamp_min(1)[:, None])
    return torch.cat(columns, 1).numpy()


def ridge_correlation(train, test, train_labels, test_labels, penalty=1000.0):
    train, test = np.c_[train, np.ones(len(train))], np.c_[test, np.ones(len(test))]
    normal = train.T @ train + penalty * np.diag(np.r_[np.ones(train.shape[1] - 1), 0])
    predicted = test @ np.linalg.solve(normal, train.T @ train_labels)
    return np.corrcoef(predicted, test_labels)[0, 1]


def test_looks_like_mosei(corpus):
    assert [len(s) for s in (corpus.train, corpus.valid, corpus.test)] == [1428, 164, 408]
    assert corpus.features == {"text": 300, "audio": 74, "visual": 35} and corpus.label_range == (-3, 3)
    lengths = torch.stack([corpus.train.lengths(m) for m in corpus.modalities])
    words = lengths.amax(0).double()
    assert 20 <= words.mean() <= 25 and words.median() < words.mean()
    assert words.min() >= 1 and words.max() == 50 and 0 < (words == 50).double().mean() < 0.1
    assert ((lengths == 0) | (lengths == words)).all(), "modalities are word-aligned or missing"
    assert 0.03 < (lengths == 0).double().mean() < 0.07
    assert not (lengths == 0).all(0).any()


def test_labels_are_thirds(corpus):
    labels = corpus.train.labels.double()
    assert labels.min() >= -3 and labels.max() <= 3
    assert torch.allclose((labels * 3).round() / 3, labels, atol=1e-6)
    assert 0.8 < labels.std() < 1.5 and len(labels.unique()) > 12


def test_only_the_audio_is_broken(corpus):
    counts = count_nonfinite(corpus.train)
    cells = corpus.train.flat("audio").numel()
    assert counts["text"].nan == counts["text"].inf == counts["visual"].nan == counts["visual"].inf == 0
    assert 0.0004 < counts["audio"].nan / cells < 0.0006 and 0.0004 < counts["audio"].inf / cells < 0.0006
    assert torch.isneginf(corpus.train.flat("audio")).sum() == counts["audio"].inf


def test_scales_differ_and_steps_are_correlated(corpus):
    audio = corpus.train.flat("audio").nan_to_num(0, 0, 0)[:, :-1]
    assert audio.std(0).max() / audio.std(0).min() > 100
    sample = max(corpus.train, key=lambda s: len(s.values["text"])).values["text"]
    centred = sample - sample.mean(0)
    lag = (centred[1:] * centred[:-1]).sum(0) / centred.square().sum(0)
    assert 0.3 < lag.mean() < 0.95


def test_pooled_ridge_finds_the_sentiment_and_order_adds_to_it(corpus):
    standardiser = Standardiser().fit(corpus.train)
    train, test = standardiser.transform(corpus.train), standardiser.transform(corpus.test)
    labels = corpus.train.labels.numpy(), corpus.test.labels.numpy()
    pooled = ridge_correlation(means(train), means(test), *labels)

    def order(split):
        return np.c_[means(split), means(split, lambda position: position)]

    assert 0.5 < pooled < 0.7
    assert ridge_correlation(order(train), order(test), *labels) > pooled + 0.1


def test_modalities_add_to_each_other(corpus):
    standardiser = Standardiser().fit(corpus.train)
    train, test = (means(standardiser.transform(s)) for s in (corpus.train, corpus.test))
    labels = corpus.train.labels.numpy(), corpus.test.labels.numpy()
    whole = ridge_correlation(train, test, *labels)
    bounds = np.cumsum([0, 300, 74, 35])
    alone = [ridge_correlation(train[:, a:b], test[:, a:b], *labels) for a, b in pairwise(bounds)]
    assert all(0.25 < c < whole - 0.02 for c in alone)


def test_is_a_function_of_the_seed():
    first, again, other = (synthetic(60, seed=s, features=SMALL) for s in (1, 1, 2))
    for modality in SMALL:
        a, b = (d.train.flat(modality).nan_to_num() for d in (first, again))
        assert torch.equal(a, b) and torch.equal(first.train.lengths(modality), again.train.lengths(modality))
    assert torch.equal(first.train.labels, again.train.labels)
    assert not torch.equal(first.train.labels, other.train.labels)


def test_label_share_touches_training_labels_only():
    whole, part = (synthetic(100, labelled=share, features=SMALL) for share in (1.0, 0.25))
    known = ~torch.isnan(part.train.labels)
    assert known.sum() == round(0.25 * len(part.train))
    assert torch.equal(part.train.labels[known], whole.train.labels[known])
    assert not torch.isnan(part.test.labels).any() and not torch.isnan(part.valid.labels).any()


def test_parameters_at_their_ends():
    clean = synthetic(40, missing=0, corrupt=0, max_length=1, features=SMALL)
    assert all((clean.train.lengths(m) == 1).all() for m in SMALL)
    assert count_nonfinite(clean.train)["audio"].nan == 0
    assert torch.isfinite(clean.train.flat("text")).all()
    lone = synthetic(40, missing=1, features=SMALL).train
    assert (sum((lone.lengths(m) > 0).int() for m in SMALL) == 1).all()
    assert synthetic(20, features={"pose": 3}).features == {"pose": 3}


def test_is_fast():
    start = time.process_time()
    synthetic()
    assert time.process_time() - start < 5, "about 0.8 s on one core when written"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(samples=5), "samples must be an integer >= 10, got 5"),
        (dict(samples=20.5), "samples must be an integer >= 10, got 20.5"),
        (dict(seed=2**64), "seed must have 64 bits at most, got 18446744073709551616"),
        (dict(labelled=1.1), r"labelled must lie in \[0, 1\], got 1.1"),
        (dict(missing=-0.5), r"missing must lie in \[0, 1\], got -0.5"),
        (dict(corrupt=float("nan")), r"corrupt must lie in \[0, 1\], got nan"),
        (dict(max_length=0), "max_length must be an integer >= 1, got 0"),
        (dict(features={}), "features must name at least one modality"),
        (dict(features={"text": 0}), r"features\['text'\] must be an integer >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=f"synthetic: {message}"):
        synthetic(**arguments)
