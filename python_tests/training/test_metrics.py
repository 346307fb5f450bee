"""Metrics follow the range of the labels, from the data to every table; what is undefined prints as such."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_help import TINY, mmfast, train

from mmfast.data import MultimodalData, MultimodalDataset, load, save, synthetic
from mmfast.metrics import metrics_for
from mmfast.training.predictions import read_predictions

FEATURES = {"text": 8, "audio": 6, "visual": 4}
# How labels in [-3, 3] become those of the range.
SCALES = {(1, 7): lambda y: y + 4, (-1, 1): lambda y: y / 3, (-2, 2): lambda y: y / 1.5}
QUICK = ["--supervised.epochs=2", "--pretraining.epochs=1"]


def scaled(label_range, samples=80, **changes) -> MultimodalData:
    data = synthetic(samples, max_length=6, features=FEATURES)
    parts = {
        name: getattr(data, name).with_labels(SCALES[label_range](getattr(data, name).labels).numpy())
        for name in ("train", "valid", "test")
    }
    return MultimodalData(**parts, label_range=label_range, **changes)


@pytest.mark.parametrize("label_range", SCALES)
def test_finetune_and_evaluate_measure_by_the_range_of_the_labels(label_range, tmp_path, capsys):
    save(scaled(label_range), tmp_path / "data.npz")
    folder = train("finetune", tmp_path / "run", f"--data.path={tmp_path / 'data.npz'}", *QUICK)
    printed = capsys.readouterr().out
    _, predictions, truths = read_predictions(folder / "predictions.csv")
    expected = metrics_for(label_range).measure(predictions, truths)
    assert json.loads((folder / "result.json").read_text())["metrics"] == expected
    assert mmfast("evaluate", folder / "best.ckpt", "--out", tmp_path / "m.json") == 0
    assert json.loads((tmp_path / "m.json").read_text()) == expected
    for text in (printed, capsys.readouterr().out):
        names = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
        assert names == list(expected)


@pytest.mark.parametrize("label_range", [(1, 7), (-1, 1)])
def test_an_experiment_prints_no_metric_of_another_convention(label_range, tmp_path, capsys):
    save(scaled(label_range), tmp_path / "data.npz")
    arguments = [
        f"--data.path={tmp_path / 'data.npz'}",
        "--experiment.methods=[FS]",
        "--experiment.seeds=[0]",
    ]
    folder = train("experiment", tmp_path / "run", *arguments, *QUICK)
    header = next(line for line in capsys.readouterr().out.splitlines() if " Corr " in line).split()
    report = (folder / "report.md").read_text()
    with open(folder / "results.csv", newline="") as file:
        columns = next(csv.reader(file))
    assert columns[2:] == list(metrics_for(label_range).measure([0.0], [0.5]))
    if label_range == (1, 7):
        assert header == ["n", "Corr", "MAE", "CCC"]
        assert not any(word in report for word in ("Acc", "F1", "acc2", "has0", "f1_as_published", "percent"))
    else:
        assert header == ["n", "Corr", "MAE", "Acc2", "F1", "Acc3", "Acc5"]
        assert "a truth of 0 as negative" in report and "acc7" not in report
    row = next(line for line in report.splitlines() if line.startswith("| constant"))
    assert row.split("|")[3].strip() == "-", "a constant has no correlation"
    assert "nan" not in report.lower()


def test_what_is_undefined_prints_as_a_dash_never_as_a_number(tmp_path, capsys):
    data = synthetic(80, max_length=6, features=FEATURES)
    one = data.test.subset([int(np.argmax(np.abs(data.test.labels.numpy())))])
    save(replace(data, test=one), tmp_path / "one.npz")
    folder = train("finetune", tmp_path / "run", f"--data.path={tmp_path / 'one.npz'}", *QUICK)
    assert mmfast("evaluate", folder / "best.ckpt") == 0
    # Complete already: the second time numbers come from the result's file.
    train("finetune", tmp_path / "run", f"--data.path={tmp_path / 'one.npz'}", *QUICK, "--resume")
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  corr")]
    assert lines == [["corr", "-"]] * 3
    assert json.loads((folder / "result.json").read_text())["metrics"]["corr"] is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return train("finetune", folder / "run", "--supervised.epochs=1") / "best.ckpt"


def test_evaluate_takes_the_range_that_the_network_was_trained_on(trained, tmp_path, capsys):
    few = synthetic(80, seed=1, max_length=6, features=FEATURES).test
    few = few.with_labels((few.labels / 3).numpy())
    save(MultimodalData(test=few), tmp_path / "few.npz")
    assert mmfast("evaluate", trained, "--data", tmp_path / "few.npz") == 0
    assert "acc7_cmu" in capsys.readouterr().out, (
        "labels that happen to be small are still of the range [-3, 3]"
    )


def test_labels_outside_the_range_are_refused(trained, tmp_path, capsys):
    other = synthetic(80, seed=1, max_length=6, features=FEATURES)
    save(scaled((1, 7)), tmp_path / "likert.npz")
    assert mmfast("evaluate", trained, "--data", tmp_path / "likert.npz") == 2
    assert "labels must lie in [-3, 3], the range of the labels that" in capsys.readouterr().err
    labels = other.valid.labels.clone()
    labels[1] = 3.5
    save(replace(other, valid=other.valid.with_labels(labels.numpy())), tmp_path / "out.npz")
    name = other.valid.names[1]
    rule = "labels must lie in [-3, 3], label_range of data synthetic, but for one in a hundred"
    sentence = f"{rule}, got 3.5 in sample {name!r}"
    for command in ("finetune", "experiment"):
        arguments = [f"--data.path={tmp_path / 'out.npz'}", f"--run.folder={tmp_path / command}"]
        assert mmfast(command, *TINY, *arguments) == 2
        assert sentence in capsys.readouterr().err
        assert not list(tmp_path.rglob("*.ckpt"))


def test_a_lone_file_without_a_range_takes_it_from_its_labels(tmp_path):
    values = {"text": [np.ones((1, 2))] * 3}
    save(MultimodalDataset(values, [1.0, 4.0, 7.0]), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as archive:
        arrays = {key: archive[key] for key in archive.files if key != "label_range"}
    np.savez(tmp_path / "b.npz", **arrays)
    assert load(tmp_path / "b.npz").label_range == (1, 7)
