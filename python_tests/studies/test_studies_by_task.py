"""Experiments on classes, label sets and several numbers: baselines, intervals, verdict and report."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from training_help import TINY, mmfast

from mmfast.data import MultimodalData, save, synthetic
from mmfast.studies.baselines import base_rate, constant, logistic, ridge
from mmfast.studies.report import plots
from mmfast.studies.statistics import bootstrap, compared, interval
from mmfast.tasks import Classification, MultiLabel, Regression
from mmfast.training.data_config import DataConfig
from mmfast.training.splits import make_splits

NAMES = ("x", "y", "z")
FEATURES = {"text": 12, "audio": 8}
TASKS = [
    Classification(NAMES),
    MultiLabel(NAMES, threshold=0.4),
    Regression(NAMES),
    Regression(("label",), label_range=(-3, 3)),
]


def random_outcome(task, holes: bool = True):
    """Predictions of two runs (2, N, columns) and truths."""
    rng = np.random.default_rng(3)
    p = rng.normal(size=(2, 60, task.outputs))
    p = task.predictions(torch.from_numpy(p).flatten(0, 1)).numpy().reshape(p.shape)
    if task.name == "classification":
        return p, rng.choice([0.0, 2.0], 60)  # one class is predicted and never true
    y = (
        rng.normal(size=(60, task.outputs))
        if task.name == "regression"
        else (rng.random((60, 3)) < [0.5, 0.2, 0])
    )
    y = y.astype(float)
    if task.outputs == 1:
        return p, y[:, 0]
    y[rng.random(y.shape) < 0.2 * holes] = np.nan
    y[:, 0] = np.nan_to_num(y[:, 0])  # every sample keeps a label
    return p, y


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.name}{task.outputs}")
def test_what_is_resampled_is_what_is_reported(task):
    p, y = random_outcome(task)
    metrics, decided = compared(task)
    for name, metric in metrics.items():
        expected = [task.metrics(run, y)[name] for run in p]
        np.testing.assert_allclose(metric(decided(p), y), expected, rtol=1e-5)
    low, high = interval(bootstrap(decided(p), y, metric))
    assert low < np.mean(expected) < high


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_linear_models_beat_constants_and_constants_are_shares(task):
    splits = make_splits(synthetic(500, max_length=6, features=FEATURES, task=task), DataConfig(), seed=0)
    y = np.concatenate([part.labels.numpy() for part in (splits.train, splits.valid)])
    rates = base_rate(splits)
    wanted = np.bincount(y.astype(int)) / len(y) if task == "classification" else y.mean(0)
    np.testing.assert_allclose(rates, np.tile(wanted, (len(splits.test), 1)), rtol=1e-6)
    p = logistic(splits)
    assert p.shape == rates.shape and (p >= 0).all() and (p <= 1).all()
    truths = splits.test.labels.numpy()
    if task == "classification":
        np.testing.assert_allclose(p.sum(1), 1)
        truths = np.eye(4)[truths.astype(int)]
    assert ((p - truths) ** 2).mean() < 0.9 * ((rates - truths) ** 2).mean()


def test_linear_models_of_labels_that_are_constant_or_not_known():
    data = synthetic(200, max_length=4, features=FEATURES, task="multilabel")
    labels = data.train.labels.clone()
    labels[:, 0], labels[:, 1], labels[::2, 2] = 1, 0, torch.nan
    data = MultimodalData(
        data.train.with_labels(labels), data.valid, data.test, task="multilabel", targets=data.targets
    )
    p = logistic(make_splits(data, DataConfig(), seed=0))
    assert (p[:, 0] == 1).all() and (p[:, 1] == 0).all() and np.isfinite(p).all()
    numbers = data.as_task("regression")
    splits = make_splits(numbers, DataConfig(), seed=0)
    assert ridge(splits).shape == constant(splits).shape == (len(splits.test), 6)
    assert np.isfinite(ridge(splits)).all() and set(constant(splits)[:, 1]) == {0.0}


@pytest.mark.parametrize("task", ["classification", "multilabel", "several"])
def test_an_experiment_of_each_task(task, tmp_path, capsys):
    data = synthetic(
        80,
        max_length=5,
        features=FEATURES,
        task="classification" if task == "classification" else "multilabel",
    )
    save(data.as_task("regression") if task == "several" else data, tmp_path / "data.npz")
    folder = tmp_path / "e"
    arguments = [
        "experiment",
        *TINY,
        "--supervised.epochs=2",
        "--experiment.methods=[FS, SLE]",
        "--experiment.seeds=[0, 1]",
        "--experiment.workers=1",
        f"--data.path={tmp_path / 'data.npz'}",
        f"--run.folder={folder}",
    ]
    assert mmfast(*arguments) == 0
    printed = capsys.readouterr().out
    linear, flat = ("ridge", "constant") if task == "several" else ("logistic", "base_rate")
    assert list(json.loads((folder / "results.json").read_text())) == ["FS", "SLE", linear, flat]
    with open(folder / "results.csv", newline="") as file:
        columns = set(next(csv.reader(file)))
    names = {
        "classification": {"ua", "accuracy"},
        "multilabel": {"jaccard", "auc"},
        "several": {"mae", "ccc"},
    }
    for other, own in names.items():
        assert own <= columns if other == task else not own & columns
    # Nothing of the conventions of sentiment.
    assert not {"acc2", "acc7", "f1", "f1_has0"} & columns
    report = (folder / "report.md").read_text()
    titles = {"classification": "UA", "multilabel": "Jaccard", "several": "MAE"}
    assert (
        titles[task] in printed
        and ("ridge regression" if task == "several" else "ogistic regression") in report
    )
    losses = {"classification": "cross-entropy", "multilabel": "binary cross-entropy", "several": "MAE"}
    assert (
        f"validation {losses[task]}" in report and f"of {', '.join(data.targets)}, {losses[task]}" in report
    )
    assert (folder / "plots/predictions.png").stat().st_size > 5000
    before = (folder / "report.md").read_bytes()
    assert mmfast(*arguments) == 0
    assert (folder / "report.md").read_bytes()[:500] == before[:500]


def test_a_confusion_of_more_rows_than_fit_side_by_side_draws_each_once():
    pairs = (np.array([0, 1, 1]), np.array([0, 1, 0]))
    rows = {name: pairs for name in ("FS", "SLE", "SSL", "LE")}
    assert plots.confusion(rows, ["a", "b", "c"]).startswith(b"\x89PNG")
