"""Predictions of a trained network, and the CSV file that holds them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmfast.data import MultimodalBatch, MultimodalDataset, make_loader
from mmfast.errors import UserError
from mmfast.files import write_atomically
from mmfast.metrics import metrics_for
from mmfast.training.processes import rank, world_size

# Samples of a batch without gradients, fewer where they are longer than STEPS / BATCH time steps.
BATCH, STEPS = 256, 2**16


def evaluation_batches(dataset: MultimodalDataset, shared: bool = False) -> DataLoader:
    """All samples in an order of their lengths; ``shared``, all processes have the same number of batches of them."""
    longest = int(dataset.longest().max()) if len(dataset) else 0
    size = min(BATCH, max(1, STEPS // max(longest, 1)))
    this, processes = (rank(), world_size()) if shared else (0, 1)
    size = max(size, processes)
    return make_loader(dataset, size, shuffle=False, drop_last=False, seed=0, rank=this, world_size=processes)


def predict(module: nn.Module, dataset: MultimodalDataset) -> Tensor:
    """Predictions (N,) of a network with a head; see :func:`encode`."""
    return in_order(module, module, dataset)


def encode(encoder: nn.Module, dataset: MultimodalDataset) -> Tensor:
    """Fused vectors (N, out_features) float32 on the CPU, in the order of the standardised data set; dropout off."""
    return in_order(encoder, lambda batch: encoder(batch.values, batch.lengths, batch.padding), dataset)


@torch.no_grad()
def in_order(
    module: nn.Module, function: Callable[[MultimodalBatch], Tensor], dataset: MultimodalDataset
) -> Tensor:
    """Rows float32 on the CPU that a function of the ``module`` makes of batches, in the order of the data set."""
    device = next(module.parameters(), torch.empty(0)).device
    loader = evaluation_batches(dataset)
    order = [index for batch in loader.batch_sampler.batches(0) for index in batch]
    training = module.training
    module.eval()
    rows = torch.cat([function(batch.to(device)).float().cpu() for batch in loader])
    module.train(training)
    return rows[torch.argsort(torch.tensor(order, device="cpu"))]


def measure(predictions: Tensor, truths: Tensor, label_range: tuple[float, float]) -> dict[str, float]:
    """All metrics that apply to labels of this range, NaN where one is undefined."""
    return metrics_for(label_range).measure(predictions, truths)


def write_predictions(path: Path, dataset: MultimodalDataset, predictions: Tensor) -> None:
    """CSV of ``name``, ``prediction`` and ``truth`` (empty if unknown); numbers read back to the same float32."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("name", "prediction", "truth"))
    for name, prediction, truth in zip(
        dataset.names, predictions.numpy(), dataset.labels.numpy(), strict=True
    ):
        rows.writerow((name, str(prediction), "" if np.isnan(truth) else str(truth)))
    write_atomically(path, text.getvalue())


def read_predictions(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, predictions and truths (float32, NaN where unknown) of a file by :func:`write_predictions`."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        numbers = [[np.float32(row[key] or "nan") for row in rows] for key in ("prediction", "truth")]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"predictions {path}: not a CSV file with name, prediction and truth: {error}"
        ) from error
    return [row["name"] for row in rows], *(np.array(column, dtype=np.float32) for column in numbers)
