"""What a trained encoder makes of samples: vectors for a classifier, a search or a plot of one's own."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfast.data import MultimodalDataset
from mmfast.errors import UserError
from mmfast.files import write_atomically
from mmfast.models import Encoder
from mmfast.training import runs
from mmfast.training.predictions import in_order
from mmfast.training.restored import samples

# Attributes that are arrays of the same name in a file.
NUMBERS, TEXTS = (
    ("fused", "ids", "labels", "seen"),
    ("names", "task", "targets", "checkpoint", "split"),
)


@dataclass(frozen=True)
class Embeddings:
    """Vectors of N samples, on the CPU, in the order of their data.

    Attributes:
        fused: (N, out_features) float32, of all modalities: what a projector or head is given.
        modalities: modality -> (N, H) float32 before the modalities meet, zeros where it is missing.
        present: modality -> (N,) bool, whether a sample has it.
        names: of the samples.
        ids: (N,) int64.
        labels: (N,) numbers or indices of classes, or (N, K) numbers or labels of 0 and 1: float32, NaN for none.
        task, targets: what the labels are, and the names of their columns or classes.
        seen: (N,) bool, which samples the run saw in any way, labelled or not.
        checkpoint, split: what they were made of.
    """

    fused: Tensor
    modalities: dict[str, Tensor]
    present: dict[str, Tensor]
    names: list[str]
    ids: Tensor
    labels: Tensor
    task: str
    targets: tuple[str, ...]
    seen: Tensor
    checkpoint: str
    split: str

    def __len__(self) -> int:
        return len(self.ids)

    def save(self, path: str | os.PathLike) -> None:
        """Write an .npz archive of plain arrays: the attributes, ``modality/NAME`` and ``present/NAME``.

        Raises:
            UserError: the file cannot be written; a previous one is untouched.
        """
        arrays = {name: getattr(self, name).numpy() for name in NUMBERS}
        arrays |= {name: np.array(getattr(self, name)) for name in TEXTS}
        for key, vectors in (("modality", self.modalities), ("present", self.present)):
            arrays |= {f"{key}/{name}": values.numpy() for name, values in vectors.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_atomically(path, buffer.getbuffer())


def embed(
    checkpoint: str | os.PathLike, data: str | os.PathLike | None = None, split: str = "all"
) -> Embeddings:
    """Vectors of the samples of a split by the encoder of a checkpoint, standardised as those of its run.

    Args:
        checkpoint: of a pre-training or a supervised run.
        data: file or folder of features; the run's own if None.
        split: ``train``, ``valid``, ``test``, ``unlabelled``, ``all`` of them, or those of them that the run has not
            seen in any way: ``unseen``.

    Raises:
        UserError: not a checkpoint of mmfast, no such data, other features, a split without samples; without
            ``data``, data that are no longer those of the run.
    """
    encoder, record = runs.restore_encoder(Path(checkpoint))
    found = samples(str(checkpoint), record, data and os.fspath(data), split)
    dataset = found.dataset
    if len(dataset) == 0:
        raise UserError(f"embed: the {split} split holds no samples")
    fused, modalities = encode(encoder, dataset)
    return Embeddings(
        fused,
        modalities,
        {name: dataset.lengths(name) > 0 for name in dataset.modalities},
        dataset.names,
        dataset.ids,
        dataset.labels,
        dataset.task,
        dataset.targets,
        found.seen.mask(dataset),
        str(checkpoint),
        split,
    )


def encode(encoder: Encoder, dataset: MultimodalDataset) -> tuple[Tensor, dict[str, Tensor]]:
    """Fused vectors (N, out_features), and modality -> (N, H), of a standardised data set; dropout off.

    Raises:
        UserError: an encoder that has no vectors of single modalities.
    """
    widths: list[int] = []

    def vectors(batch) -> Tensor:
        representations = encoder.encode(batch.values, batch.lengths, batch.padding)
        fused = encoder.fuse(representations)
        try:
            each = encoder.vectors(representations)
        except TypeError as error:
            raise UserError(f"embed: {error}") from error
        here = [each[name].masked_fill((batch.lengths[name] == 0)[:, None], 0) for name in encoder.features]
        widths[:] = [row.shape[1] for row in (fused, *here)]
        return torch.cat((fused, *here), dim=1)

    fused, *each = (part.clone() for part in in_order(encoder, vectors, dataset).split(widths, dim=1))
    return fused, dict(zip(encoder.features, each, strict=True))
