"""Metrics against hand-made numbers, their definitions and scikit-learn."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import rotation
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast import metrics
from mmfast.errors import UserError

# One sample per column; every class border is met once.
TRUTHS = [-3.0, -2.4, -1.0, -0.2, 0.0, 0.0, 0.4, 1.0, 2.6, 3.0]
PREDICTED = [-2.6, -1.4, 0.2, -0.6, 0.0, 0.5, 0.6, 1.5, 3.9, 2.5]

REGRESSION = ["mae", "corr", "acc2", "f1", "f1_as_published", "acc2_has0", "f1_has0", "acc2_gt0", "f1_gt0"]
REGRESSION += ["acc5", "acc7", "acc7_cmu"]
# Multiples of 0.1, so that zeros, ties and class borders come up.
scores = st.lists(st.tuples(st.integers(-45, 45), st.integers(-30, 30)), min_size=1, max_size=40)


def split(pairs):
    p, y = np.array(pairs, dtype=np.float64).T / 10
    return p, y


def test_hand_made_example():
    got = metrics.regression_metrics(PREDICTED, TRUTHS)
    assert list(got) == REGRESSION
    assert got["mae"] == pytest.approx(6.0 / 10)
    # Rounded truths -3 -2 -1 0 0 0 0 1 3 3, predictions -3 -1 0 -1 0 0 1 2 3 2 (0.5, 1.5, 2.5 go to even).
    assert got["acc7"] == 4 / 10
    # Clipped to 2 both: -2 -2 -1 0 0 0 0 1 2 2 against -2 -1 0 -1 0 0 1 2 2 2.
    assert got["acc5"] == 5 / 10
    # Away from zero: -3 -3 -1 -1 0 0 1 1 3 3 against -3 -2 1 -1 0 1 1 2 3 3.
    assert got["acc7_cmu"] == 6 / 10
    # Eight truths are not 0; of them -1.0 is taken for positive.
    assert got["acc2"] == 7 / 8
    assert got["acc2_has0"] == 9 / 10
    assert got["acc2_gt0"] == 8 / 10
    # Zeros out: 4 negative (3 found), 4 positive and 5 predicted so: F1 6/7 and 8/9.
    assert got["f1"] == pytest.approx((4 * 6 / 7 + 4 * 8 / 9) / 8)
    assert got["f1_as_published"] == pytest.approx((3 * 6 / 7 + 5 * 8 / 9) / 8)
    assert got["corr"] == pytest.approx(np.corrcoef(PREDICTED, TRUTHS)[0, 1], abs=1e-14)


BINARISATIONS = {
    "": lambda p, y: (p[y != 0] > 0, y[y != 0] > 0),
    "_has0": lambda p, y: (p >= 0, y >= 0),
    "_gt0": lambda p, y: (p > 0, y > 0),
}


@rotation.examples(150)
@given(scores)
def test_f1_and_accuracy_agree_with_scikit_learn(pairs):
    sklearn = pytest.importorskip("sklearn.metrics")
    p, y = split(pairs)
    for suffix, binarise in BINARISATIONS.items():
        predicted, true = binarise(p, y)
        f1, acc2 = getattr(metrics, "f1" + suffix)(p, y), getattr(metrics, "acc2" + suffix)(p, y)
        if len(true) == 0:
            assert math.isnan(f1) and math.isnan(acc2) and math.isnan(metrics.f1_as_published(p, y))
            continue
        assert f1 == pytest.approx(sklearn.f1_score(true, predicted, average="weighted"), abs=1e-12)
        assert acc2 == pytest.approx(sklearn.accuracy_score(true, predicted), abs=1e-12)
        if suffix == "":
            swapped = sklearn.f1_score(predicted, true, average="weighted")
            assert metrics.f1_as_published(p, y) == pytest.approx(swapped, abs=1e-12)


@rotation.examples(100)
@given(scores)
def test_ranges_and_perfect_predictions(pairs):
    p, y = split(pairs)
    got, perfect = metrics.regression_metrics(p, y), metrics.regression_metrics(y, y)
    assert all(math.isnan(v) or 0 <= v <= 1 for k, v in got.items() if k not in ("mae", "corr"))
    assert math.isnan(got["corr"]) if len(set(p)) == 1 or len(set(y)) == 1 else -1 <= got["corr"] <= 1
    for name, value in perfect.items():
        expected = 0.0 if name == "mae" else 1.0
        undefined = len(set(y)) == 1 if name == "corr" else not y.any()
        assert value == pytest.approx(expected) or (math.isnan(value) and undefined)


# value: its class by acc7, acc5 and acc7_cmu
BORDERS = {
    0.0: (0, 0, 0),
    1e-9: (0, 0, 1),
    0.5: (0, 0, 1),
    1.0: (1, 1, 1),
    1.5: (2, 2, 2),
    2.5: (2, 2, 3),
    9.0: (3, 2, 3),
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("value", BORDERS)
def test_class_of_every_border(value, sign):
    for metric, size in zip((metrics.acc7, metrics.acc5, metrics.acc7_cmu), BORDERS[value], strict=True):
        expected = sign * size
        others = [c for c in range(-3, 4) if metric([c], [expected]) == 0]
        assert len(others) in (5, 6)
        assert metric([sign * value], [expected]) == 1
        assert all(metric([sign * value], [other]) == 0 for other in others)


def test_corr_of_constants_is_undefined():
    for p, y in (([0.1] * 7, range(7)), (range(7), [2] * 7), ([1], [1])):
        assert math.isnan(metrics.corr(p, y))
    assert [metrics.shown(x, 4) for x in (math.nan, None, 0.0, -0.25)] == ["-", "-", "0.0000", "-0.2500"]
    assert metrics.shown(0.5, 1, 100) == "50.0" and metrics.shown(0.5, 2, sign="+") == "+0.50"


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_corr_survives_extreme_scales_and_small_differences(scale):
    p, y = np.random.default_rng(0).normal(size=(2, 50))
    expected = np.corrcoef(p, y)[0, 1]
    assert metrics.corr(p * scale, y) == pytest.approx(expected, abs=1e-13)
    # Differences of 1e-9 in numbers near 1 keep 7 digits in fp64.
    assert metrics.corr(1 + 1e-9 * p, -y * scale) == pytest.approx(-expected, abs=1e-6)
    assert metrics.corr([1.0, 1.0 + 2**-52], [0, 1]) == pytest.approx(1.0)
    assert metrics.corr([-1.5e308, 1.5e308], [0, 1]) == pytest.approx(1.0)


def test_truths_that_are_all_zero_have_no_sign():
    got = metrics.regression_metrics([0.3, -0.2], [0.0, 0.0])
    undefined = {name for name, value in got.items() if math.isnan(value)}
    assert undefined == {"corr", "acc2", "f1", "f1_as_published"}


def test_inputs_of_every_kind_agree():
    expected = metrics.regression_metrics(PREDICTED, TRUTHS)
    p, y = torch.tensor(PREDICTED, dtype=torch.float64, requires_grad=True), np.array(TRUTHS)[:, None]
    assert metrics.regression_metrics(p, y) == expected
    assert all(type(value) is float for value in expected.values())
    half = torch.tensor([0.5, -1.5], dtype=torch.bfloat16)
    assert metrics.mae(half, torch.tensor([0, 1])) == 1.5


FUNCTIONS = [getattr(metrics, name) for name in REGRESSION]
FUNCTIONS += [metrics.regression_metrics, metrics.sims_metrics, metrics.weighted_accuracy, metrics.ccc]


@pytest.mark.parametrize("metric", FUNCTIONS, ids=lambda f: f.__name__)
def test_bad_input_is_one_sentence(metric):
    for p, y, message in [
        (
            [1.0, math.nan, math.inf],
            [1.0, 2.0, 3.0],
            "predictions must be finite, got 2 NaN or infinite of 3",
        ),
        ([1.0, 2.0], [math.nan, 2.0], "truths must be finite, got 1 NaN or infinite of 2"),
        ([1.0, 2.0, 3.0], [1.0, 2.0], "must be equally many, got 3 and 2"),
        ([], [], "there is no sample"),
        (
            np.ones((3, 2)),
            np.ones((3, 2)),
            r"predictions must be one number per sample, got the shape \(3, 2\)",
        ),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            metric(p, y)
        assert str(caught.value).startswith(f"{metric.__name__}: ")
    with pytest.raises(TypeError, match="predictions must be numbers, got list"):
        metric(["good", "bad"], [1.0, 2.0])


def test_sims_classes():
    cuts = [-1.0, -0.7, -0.6, -0.1, -0.05, 0.0, 0.1, 0.2, 0.7, 0.8, 1.0]
    two = [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    three = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    five = [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    for dtype in (np.float32, np.float64):
        x = np.array(cuts, dtype=dtype)
        for i, value in enumerate(x):
            got = metrics.sims_metrics([value] * len(x), x)
            for name, classes in (("acc2", two), ("acc3", three), ("acc5", five)):
                assert got[name] == pytest.approx(classes.count(classes[i]) / len(x)), (name, value)


def test_sims_set():
    sklearn = pytest.importorskip("sklearn.metrics")
    p, y = np.random.default_rng(0).uniform(-1.3, 1.3, size=(2, 200))
    got = metrics.sims_metrics(p, np.clip(y, -1, 1))
    assert list(got) == ["mae", "corr", "acc2", "f1", "acc3", "acc5"]
    assert got["f1"] == pytest.approx(sklearn.f1_score(y > 0, p > 0, average="weighted"))
    assert got["mae"] == metrics.mae(p, np.clip(y, -1, 1))
    assert metrics.sims_metrics([9.0, -9.0], [1.0, -1.0])["acc5"] == 1


@settings(max_examples=150, deadline=None)
@given(scores, st.sampled_from([1e-150, 1.0, 1e150]))
def test_ccc_is_the_formula_on_any_scale(pairs, scale):
    p, y = split(pairs)
    distance = p.var() + y.var() + (p.mean() - y.mean()) ** 2
    got = metrics.ccc(p * scale, y * scale)
    if distance == 0:
        assert math.isnan(got)
    else:
        assert got == pytest.approx(2 * np.cov(p, y, bias=True)[0, 1] / distance, abs=1e-12)
    assert math.isnan(metrics.ccc(y, y)) or metrics.ccc(y, y) == pytest.approx(1)


SIGNS = REGRESSION[2:9]
# range of the labels: the names measured, and those of a short table
SETS = {
    (-3, 3): (REGRESSION, ["corr", "mae", "acc2", "f1", "acc5", "acc7"]),
    (-2, 2): (["mae", "corr", *SIGNS, "acc5"], ["corr", "mae", "acc2", "f1", "acc5"]),
    (-1, 1): (["mae", "corr", "acc2", "f1", "acc3", "acc5"], ["corr", "mae", "acc2", "f1", "acc3", "acc5"]),
    (-5, 5): (["mae", "corr", *SIGNS], ["corr", "mae", "acc2", "f1"]),
    (1, 7): (["mae", "corr", "ccc"], ["corr", "mae", "ccc"]),
    (0, 1): (["mae", "corr", "ccc"], ["corr", "mae", "ccc"]),
    (-1, 3): (["mae", "corr", "ccc"], ["corr", "mae", "ccc"]),
}


@pytest.mark.parametrize("label_range", SETS)
def test_metrics_are_those_whose_convention_holds_for_the_range_of_labels(label_range):
    low, high = label_range
    p, y = np.random.default_rng(0).uniform(low, high, size=(2, 60))
    found = metrics.metrics_for(label_range)
    assert (list(found.measure(p, y)), list(found.main)) == SETS[label_range]
    for name, value in found.measure(p, y).items():
        if label_range != (-1, 1):
            assert value == getattr(metrics, name)(p, y), name
    if low == -1 and high == 1:
        assert found.measure(p, y) == metrics.sims_metrics(p, y)


def test_metrics_of_emotions_and_of_no_known_task():
    found = metrics.metrics_for(None, "emotions")
    logits, truths = np.random.default_rng(0).normal(size=(9, 8)), np.eye(4)[[0, 1, 2, 3, 0, 1, 2, 3, 0]]
    assert found.measure(logits, truths) == metrics.iemocap_metrics(logits, truths)
    assert list(found.main) == list(found.measure(logits, truths))
    with pytest.raises(
        UserError, match="metrics_for: task must be 'regression' or 'emotions', got 'ranking'"
    ):
        metrics.metrics_for((-3, 3), "ranking")


def test_iemocap():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    logits, truths = generator.normal(size=(50, 4, 2)), generator.integers(2, size=(50, 4))
    got = metrics.iemocap_metrics(logits, truths)
    for i, emotion in enumerate(["neutral", "happy", "sad", "angry"]):
        predicted = logits[:, i, 1] > logits[:, i, 0]
        assert got[f"acc_{emotion}"] == pytest.approx(np.mean(predicted == truths[:, i]))
        expected = sklearn.f1_score(truths[:, i], predicted, average="weighted")
        assert got[f"f1_{emotion}"] == pytest.approx(expected)
    assert len(got) == 8 and metrics.iemocap_metrics(torch.tensor(logits).view(50, 8), truths) == got
    for bad_logits, bad_truths, message in [
        (logits[:, :3], truths, r"logits must have the shape .* got \(50, 3, 2\)"),
        (logits[:0], truths[:0], r"N > 0, got \(0, 4, 2\)"),
        (3.0, truths, r"got \(\)"),
        (logits, truths[1:], r"truths must have the shape \(50, 4\), got \(49, 4\)"),
        (logits, truths + 1, "truths must be 0 or 1, got 2"),
        (logits * math.nan, truths, "logits must be finite, got 400"),
    ]:
        with pytest.raises(UserError, match=message):
            metrics.iemocap_metrics(bad_logits, bad_truths)


@settings(max_examples=60, deadline=None)
@given(scores)
def test_weighted_accuracy_is_the_formula_and_balanced_accuracy(pairs):
    sklearn = pytest.importorskip("sklearn.metrics")
    p, y = split(pairs)
    p, y = p > 0, y > 0
    positive, negative = y.sum(), (~y).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = metrics.weighted_accuracy(p, y)
    if positive == 0 or negative == 0:
        assert math.isnan(got)
        return
    hits, rejections = (p & y).sum(), (~p & ~y).sum()
    assert got == pytest.approx((hits * negative / positive + rejections) / (2 * negative), abs=1e-12)
    assert got == pytest.approx(sklearn.balanced_accuracy_score(y, p), abs=1e-12)


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    generator, covered = np.random.default_rng(0), 0
    for i in range(200):
        y = generator.normal(size=60)
        p = 0.6 * y + 0.8 * generator.normal(size=60)
        low, high = metrics.bootstrap_interval(metrics.corr, p, y, n=200, seed=i, confidence=0.9)
        assert low < high
        covered += low <= 0.6 <= high
    # 180 expected, standard deviation 4.2; the percentile bootstrap covers slightly too little.
    assert 160 <= covered <= 192


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    error = np.random.default_rng(0).normal(2, 0.3, size=400)
    low, high = metrics.bootstrap_interval(metrics.mae, error, np.zeros(400))
    half_width = 1.96 * error.std() / 20
    assert low == pytest.approx(error.mean() - half_width, abs=0.1 * half_width)
    assert high == pytest.approx(error.mean() + half_width, abs=0.1 * half_width)


def test_bootstrap_interval_is_reproducible_and_edges_are_defined():
    p, y = np.random.default_rng(0).normal(size=(2, 30))
    first = metrics.bootstrap_interval(metrics.mae, p, y, n=50, seed=1)
    assert first == metrics.bootstrap_interval(metrics.mae, p, y, n=50, seed=1)
    assert first != metrics.bootstrap_interval(metrics.mae, p, y, n=50, seed=2)
    assert all(map(math.isnan, metrics.bootstrap_interval(metrics.acc2, p, 0 * y, n=20)))
    # With a single sign in 30 truths about a third of the resamples hold none: they are left out.
    rare = np.zeros(30)
    rare[0] = p[0]
    assert metrics.bootstrap_interval(metrics.acc2, p, rare, n=50) == (1.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.bootstrap_interval(metrics.corr, [1.0, 2.0], [1.0, 2.0], n=20)[1] == pytest.approx(1.0)
    with pytest.raises(UserError, match="n must be at least 1, got 0"):
        metrics.bootstrap_interval(metrics.mae, p, y, n=0)
    with pytest.raises(UserError, match=r"confidence must be in \(0, 1\), got 95"):
        metrics.bootstrap_interval(metrics.mae, p, y, confidence=95)
    with pytest.raises(UserError, match="bootstrap_interval: predictions must be finite, got 1"):
        metrics.bootstrap_interval(metrics.mae, [math.nan], [1.0])


def test_scikit_learn_is_not_imported():
    code = "import sys, mmfast.metrics; sys.exit('sklearn' in sys.modules or 'torchmetrics' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
