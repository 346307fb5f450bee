"""Runs with classes, label sets and several numbers, all from the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_help import TINY, checkpoint, mmfast, train

from mmfast.class_metrics import classification_metrics, multilabel_metrics
from mmfast.data import MultimodalData, load, save, synthetic
from mmfast.tasks import MultiLabel, task_of
from mmfast.training.predictions import read_predictions

SMALL = {"samples": 80, "max_length": 6, "features": {"text": 8, "audio": 6, "visual": 4}}
QUICK = ("--supervised.epochs=2",)


def corpus(kind: str) -> MultimodalData:
    """A tiny one, some of whose cells and samples have no labels."""
    data = synthetic(**SMALL, labelled=0.8, task="multilabel" if kind == "several" else kind)
    if kind == "classification":
        return data
    parts = {}
    for name in ("train", "valid", "test"):
        labels = getattr(data, name).labels.clone()
        labels[1, 2] = torch.nan
        if kind == "several":
            labels = 2 * labels + torch.arange(6)
        parts[name] = getattr(data, name).with_labels(labels)
    task = "regression" if kind == "several" else kind
    return MultimodalData(**parts, task=task, targets=data.targets)


def err(capsys) -> str:
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", ["classification", "multilabel", "several"])
def test_a_run_of_each_task_from_data_to_predictions(kind, tmp_path, capsys):
    data = corpus(kind)
    save(data, tmp_path / "data.npz")
    pretrained = train(
        "pretrain", tmp_path / "pre", f"--data.path={tmp_path / 'data.npz'}", "--pretraining.epochs=1"
    )
    folder = train("finetune", tmp_path / "run", f"--from={pretrained / 'last.ckpt'}", *QUICK)
    printed = capsys.readouterr().out
    result = json.loads((folder / "result.json").read_text())
    task = task_of(result["task"])
    assert (task.name, task.targets) == (data.task, data.targets)
    assert checkpoint(folder / "best.ckpt")["mmfast"]["task"] == task.state()
    assert f"best validation {task.loss_title} {result['valid_loss']:.4f}" in printed
    names, predictions, truths = read_predictions(folder / "predictions.csv", task)
    assert predictions.shape == (len(names), len(task.columns))
    assert task.metrics(predictions, truths) == pytest.approx(result["metrics"], nan_ok=True)
    if kind == "classification":
        assert result["metrics"] == pytest.approx(
            classification_metrics(predictions, truths, task.targets), nan_ok=True
        )
        np.testing.assert_allclose(predictions.sum(1), 1, rtol=1e-5)
    elif kind == "multilabel":
        assert result["metrics"] == pytest.approx(
            multilabel_metrics(predictions, truths, task.targets), nan_ok=True
        )
        assert np.isnan(truths).sum() == 1
    else:
        assert set(result["metrics"]) >= {"mae", "corr", "ccc", "mae_happy", "ccc_surprised"}
    assert not {"acc2", "acc7", "f1_has0"} & set(result["metrics"])

    best, out = folder / "best.ckpt", tmp_path / "again.csv"
    assert mmfast("predict", best, "--split=test", f"--out={out}") == 0
    assert out.read_bytes() == (folder / "predictions.csv").read_bytes()
    assert mmfast("evaluate", best, f"--out={tmp_path / 'm.json'}") == 0
    assert json.loads((tmp_path / "m.json").read_text()) == json.loads(json.dumps(result["metrics"]))
    # Data without any labels are predicted for as well.
    bare = replace(
        data,
        **{n: getattr(data, n).with_labels(None) for n in ("train", "valid", "test")},
        task=None,
        targets=None,
        label_range=None,
    )
    save(bare, tmp_path / "bare.npz")
    assert mmfast("predict", best, f"--data={tmp_path / 'bare.npz'}", f"--out={tmp_path / 'bare.csv'}") == 0
    _, again, nothing = read_predictions(tmp_path / "bare.csv", task)
    assert len(again) == 80 and np.isnan(nothing).all() and nothing.shape[1:] == truths.shape[1:]


def test_targets_of_other_data_are_refused_and_classes_found_by_name(tmp_path, capsys):
    data = corpus("classification")
    folder = train("finetune", tmp_path / "run", "--data.synthetic.task=classification", *QUICK)
    other = synthetic(**SMALL, seed=5, task="classification")
    names = ["sad", "happy", "angry", "neutral"]
    save(other, tmp_path / "a.npz")
    save(other.as_task("classification", names), tmp_path / "b.npz")
    measured = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.json"
        assert mmfast("evaluate", folder / "best.ckpt", f"--data={tmp_path / name}.npz", f"--out={out}") == 0
        measured.append(json.loads(out.read_text()))
    assert measured[0] == measured[1]
    capsys.readouterr()
    save(other.as_task("classification", [*names, "bored"]), tmp_path / "c.npz")
    save(synthetic(**SMALL, task="multilabel"), tmp_path / "d.npz")
    for name, theirs in (
        ("c", "classification of sad, happy, angry, neutral, bored"),
        ("d", "multilabel of happy, sad"),
    ):
        assert mmfast("evaluate", folder / "best.ckpt", f"--data={tmp_path / name}.npz") == 2
        wanted = f"was trained on classification of {', '.join(data.targets)}, the data have {theirs}"
        assert wanted in err(capsys)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--data.synthetic.task=multilabel", "--task.loss=mse"],
            "loss is for regression, and the data's task is multilabel",
        ),
        (
            ["--task.class_weights=balanced"],
            "class_weights is for classification, and the data's task is regression",
        ),
        (
            ["--data.synthetic.task=classification", "--task.class_weights=[1, 2]"],
            "class_weights must be 4 numbers, one for each of neutral",
        ),
        (
            ["--data.synthetic.task=multilabel", "--task.threshold=1.5"],
            "task.threshold must be in (0, 1), got 1.5",
        ),
        (
            ["--data.synthetic.task=multilabel", "--task.positive_weights=[1, -1]"],
            "task.positive_weights must be positive numbers",
        ),
        (["--task.loss=mape"], "--task.loss must be one of mae, mse, huber, or null, got 'mape'"),
        (["--data.task=classification"], "labels must be classes, whole numbers from 0 to"),
        (["--data.task=multilabel"], "labels must be 0 or 1, or -1 or NaN for none, got"),
        (
            ["--data.synthetic.task=ranking"],
            "--data.synthetic.task must be one of regression, classification, multilabel",
        ),
    ],
)
def test_settings_and_targets_that_do_not_fit(arguments, sentence, tmp_path, capsys):
    folder = tmp_path / "run"
    assert mmfast("finetune", *TINY, f"--run.folder={folder}", *arguments) == 2
    said = err(capsys)
    assert sentence in said and said.count("\n") == 1 and not folder.exists()


def test_a_class_or_label_that_the_training_split_lacks(tmp_path, capsys):
    data = corpus("classification")
    data.train = data.train.keep_labels(data.train.labels != 2)
    save(data, tmp_path / "a.npz")
    sets = synthetic(**SMALL, task="multilabel")
    sets.train = sets.train.keep_labels(sets.train.labels[:, 3] != 1)
    save(sets, tmp_path / "b.npz")
    for name, what, lacking in (("a", "class", "sad"), ("b", "label", "fearful")):
        assert (
            mmfast("finetune", *TINY, f"--data.path={tmp_path / name}.npz", f"--run.folder={tmp_path / 'r'}")
            == 2
        )
        assert (
            f"every {what} must have a labelled training sample, the train split has none of {lacking!r}"
            in err(capsys)
        )
    assert not (tmp_path / "r").exists()


def test_classes_are_taken_for_numbers_and_back_where_the_data_are_told(tmp_path):
    save(corpus("classification"), tmp_path / "data.npz")
    folder = train(
        "finetune",
        tmp_path / "run",
        f"--data.path={tmp_path / 'data.npz'}",
        "--data.task=regression",
        "--task.loss=huber",
        *QUICK,
    )
    result = json.loads((folder / "result.json").read_text())
    assert result["task"]["name"] == "regression" and result["task"]["error"] == "huber"
    assert mmfast("evaluate", folder / "best.ckpt", f"--data={tmp_path / 'data.npz'}") == 0


def test_weights_and_threshold_reach_the_loss_and_the_metrics(tmp_path):
    save(corpus("multilabel"), tmp_path / "data.npz")
    options = [f"--data.path={tmp_path / 'data.npz'}", *QUICK]
    folder = train(
        "finetune", tmp_path / "run", *options, "--task.positive_weights=balanced", "--task.threshold=0.3"
    )
    plain = train("finetune", tmp_path / "plain", *options)
    result, other = (json.loads((f / "result.json").read_text()) for f in (folder, plain))
    task = task_of(result["task"])
    labels = load(tmp_path / "data.npz").train.labels
    there, absent = (labels == 1).sum(0), (labels == 0).sum(0)
    assert task.weights == pytest.approx((absent / there).tolist()) and task.threshold == 0.3
    assert result["history"][0]["train_loss"] > other["history"][0]["train_loss"]
    _, predictions, truths = read_predictions(folder / "predictions.csv", task)
    expected = multilabel_metrics(predictions, truths, task.targets, 0.3)
    assert result["metrics"]["f1_micro"] == expected["f1_micro"]
    assert task_of(other["task"]) == MultiLabel(task.targets)


def test_emotions_with_empty_sets_are_learnt_better_than_their_base_rates(tmp_path):
    """By intervals over three seeds: in cross-entropy, AUC, and in F1 and Jaccard against the best constant set."""
    found = []
    sets = np.array(np.meshgrid(*[[0, 1]] * 6), dtype=bool).reshape(6, 1, -1).T
    for seed in range(3):
        folder = tmp_path / f"seed{seed}"
        arguments = [
            "--data.synthetic.task=multilabel",
            "--data.synthetic.samples=1200",
            "--data.synthetic.labelled=1",
            "--data.synthetic.max_length=8",
            "--data.synthetic.features={text: 30, audio: 20, visual: 12}",
            "--model.hidden=24",
            "--supervised.batch_size=32",
            "--supervised.epochs=8",
            "--supervised.lr=3e-3",
            "--supervised.plateau_patience=2",
            f"--run.seed={seed}",
            f"--run.folder={folder}",
        ]
        assert mmfast("finetune", *TINY, *arguments) == 0
        result = json.loads((folder / "result.json").read_text())
        metrics, task = result["metrics"], task_of(result["task"])
        _, p, y = read_predictions(folder / "predictions.csv", task)
        true, predicted = y == 1, p > 0.5
        empty = ~true.any(1)
        assert 0.25 < empty.mean() < 0.4
        # Sets that are empty are told from others.
        assert predicted[empty].any(1).mean() < 0.6 * predicted[~empty].any(1).mean()
        rates = y.mean(0)
        entropy, loss = (-np.log(np.where(true, q, 1 - q)).mean() for q in (rates, p))
        either, common = (sets | true).sum(-1), (sets & true).sum(-1)
        constant = np.where(either == 0, 1, common / np.maximum(either, 1)).mean(1).max()
        found.append(
            [
                entropy - loss,
                metrics["auc"] - 0.5,
                metrics["f1_macro"] - (2 * rates / (1 + rates)).mean(),
                metrics["jaccard_empty1"] - constant,
            ]
        )
    # Student's t with two degrees of freedom.
    lower = np.mean(found, 0) - 4.302653 * np.std(found, 0, ddof=1) / np.sqrt(3)
    assert (lower > 0).all(), found
