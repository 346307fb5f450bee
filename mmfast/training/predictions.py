"""Predictions of a trained network, and the CSV file that holds them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmfast.data import MultimodalBatch, MultimodalDataset, make_loader
from mmfast.errors import UserError
from mmfast.files import write_atomically
from mmfast.tasks import Regression, Task
from mmfast.training.processes import rank, world_size

if TYPE_CHECKING:
    from mmfast.training.module import StageModule

# Samples of a batch without gradients, fewer where they are longer than STEPS / BATCH time steps.
BATCH, STEPS = 256, 2**16
# What predictions are of where nothing else is said.
ONE_NUMBER = Regression(("label",))


def evaluation_batches(dataset: MultimodalDataset, shared: bool = False) -> DataLoader:
    """All samples in an order of their lengths; ``shared``, all processes have the same number of batches of them."""
    longest = int(dataset.longest().max()) if len(dataset) else 0
    size = min(BATCH, max(1, STEPS // max(longest, 1)))
    this, processes = (rank(), world_size()) if shared else (0, 1)
    size = max(size, processes)
    return make_loader(dataset, size, shuffle=False, drop_last=False, seed=0, rank=this, world_size=processes)


def predict(module: StageModule, dataset: MultimodalDataset) -> Tensor:
    """Predictions (N, columns) of its task by a network with a head; see :func:`encode`."""
    return in_order(module, lambda batch: module.task.predictions(module(batch)), dataset)


def encode(encoder: nn.Module, dataset: MultimodalDataset) -> Tensor:
    """Fused vectors (N, out_features) float32 on the CPU, in the order of the standardised data set; dropout off."""
    return in_order(encoder, lambda batch: encoder(batch.values, batch.lengths, batch.padding), dataset)


@torch.no_grad()
def in_order(
    module: nn.Module, function: Callable[[MultimodalBatch], Tensor], dataset: MultimodalDataset
) -> Tensor:
    """Rows float32 on the CPU that a function of the ``module`` makes of batches, in the order of the data set."""
    device = next(module.parameters(), torch.empty(0, device="cpu")).device
    loader = evaluation_batches(dataset)
    order = [index for batch in loader.batch_sampler.batches(0) for index in batch]
    training = module.training
    module.eval()
    rows = torch.cat([function(batch.to(device)).float().cpu() for batch in loader])
    module.train(training)
    return rows[torch.argsort(torch.tensor(order, device="cpu"))]


def write_predictions(path: Path, dataset: MultimodalDataset, predictions: Tensor, task: Task) -> None:
    """CSV of names, predictions and truths (empty if unknown); numbers read back to the same float32.

    Of one number ``name, prediction, truth``. Of several numbers or labels a number or probability and a truth for
    each: ``name, happy, happy truth, sad, sad truth``. Of classes their names and the probability of each:
    ``name, prediction, truth, happy, sad``.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(_header(task))
    labels = dataset.labels.reshape(len(dataset), -1).numpy()
    for name, numbers, truths in zip(dataset.names, predictions.numpy(), labels, strict=True):
        if task.name == "classification":
            truth = "" if np.isnan(truths[0]) else task.targets[int(truths[0])]
            row = [task.targets[int(numbers.argmax())], truth, *map(str, numbers)]
        else:
            pairs = zip(map(str, numbers), ("" if np.isnan(t) else str(t) for t in truths), strict=True)
            row = [cell for pair in pairs for cell in pair]
        rows.writerow((name, *row))
    write_atomically(path, text.getvalue())


def read_predictions(path: Path, task: Task = ONE_NUMBER) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, predictions (N, columns) and truths (N,) or (N, K) of a file by :func:`write_predictions`.

    float32; truths are NaN where they are unknown.

    Raises:
        UserError: no such file of this task.
    """
    try:
        with open(path, newline="") as file:
            header, *rows = csv.reader(file)
        if tuple(header) != _header(task):
            raise ValueError(f"its header is {','.join(header)}")
        names = [name for name, *_ in rows]
        if task.name == "classification":
            numbers = _numbers([row[3:] for row in rows])
            truths = _numbers([[str(task.targets.index(row[2])) if row[2] else ""] for row in rows])
        else:
            numbers, truths = _numbers([row[1::2] for row in rows]), _numbers([row[2::2] for row in rows])
    except (OSError, ValueError, IndexError) as error:
        raise UserError(
            f"predictions {path}: not a CSV file of {','.join(_header(task))}: {error}"
        ) from error
    wide = task.name == "multilabel" or (len(task.columns) > 1 and task.name == "regression")
    return names, numbers.reshape(len(rows), len(task.columns)), truths if wide else truths.reshape(len(rows))


def _header(task: Task) -> tuple[str, ...]:
    if task.name == "classification":
        return "name", "prediction", "truth", *task.targets
    if task.columns == ("prediction",):
        return "name", "prediction", "truth"
    return "name", *(cell for target in task.targets for cell in (target, f"{target} truth"))


def _numbers(rows: list[list[str]]) -> np.ndarray:
    return np.array([[np.float32(cell or "nan") for cell in row] for row in rows], dtype=np.float32)
