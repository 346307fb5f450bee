"""Predictions of every task: columns, and numbers that read back bit by bit."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch

from mmfast.data import MultimodalData, MultimodalDataset
from mmfast.errors import UserError
from mmfast.tasks import Classification, MultiLabel, Regression
from mmfast.training.predictions import read_predictions, write_predictions

NAN = math.nan
CASES = {
    "number": (Regression(("label",)), [0.5, NAN, -1], ["name", "prediction", "truth"]),
    "numbers": (
        Regression(("a", "b")),
        [[0.1, NAN], [NAN, NAN], [1, 2]],
        ["name", "a", "a truth", "b", "b truth"],
    ),
    # Names that mean something to CSV, or to this file.
    "classes": (
        Classification(("so, so", "truth")),
        [1, NAN, 0],
        ["name", "prediction", "truth", "so, so", "truth"],
    ),
    "labels": (
        MultiLabel(("x", "y")),
        [[0, 1], [NAN, 0], [NAN, NAN]],
        ["name", "x", "x truth", "y", "y truth"],
    ),
    "label": (MultiLabel(("x",)), [[0], [NAN], [1]], ["name", "x", "x truth"]),
}


@pytest.fixture(params=CASES)
def case(request):
    task, labels, header = CASES[request.param]
    dataset = MultimodalDataset(
        {"text": [np.ones((1, 2))] * 3}, labels, names=["one", 'two "2"', "3,\nthree"]
    )
    dataset = MultimodalData(dataset, task=task.name, targets=task.targets).train
    outputs = 3 * torch.randn(3, task.outputs, generator=torch.Generator().manual_seed(0))
    return task, dataset, task.predictions(outputs), header


def test_predictions_read_back_bit_by_bit(case, tmp_path):
    task, dataset, predictions, header = case
    path = tmp_path / "p.csv"
    write_predictions(path, dataset, predictions, task)
    names, read, truths = read_predictions(path, task)
    assert names == dataset.names
    assert read.dtype == np.float32 and np.array_equal(read, predictions.numpy())
    assert truths.shape == dataset.labels.shape and np.array_equal(
        truths, dataset.labels.numpy(), equal_nan=True
    )
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == header and {len(row) for row in rows} == {len(header)}
    if task.name == "classification":
        # Classes are told by their names.
        assert [row[2] for row in rows[1:]] == ["truth", "", "so, so"]
        assert [row[1] for row in rows[1:]] == [task.targets[i] for i in predictions.argmax(1)]


def test_a_file_of_other_targets_is_refused(tmp_path):
    task, labels, _ = CASES["labels"]
    dataset = MultimodalDataset({"text": [np.ones((1, 2))] * 3}, labels)
    write_predictions(tmp_path / "p.csv", dataset, torch.rand(3, 2), task)
    for other in (MultiLabel(("x", "z")), Regression(("label",)), Classification(("x", "y"))):
        with pytest.raises(
            UserError, match=r"p.csv: not a CSV file of name,.*: its header is name,x,x truth"
        ):
            read_predictions(tmp_path / "p.csv", other)
