"""Weights for elsewhere: one safetensors file that says what it is, without the run that made it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.data import MultimodalBatch, Standardiser
from mmfast.data.source import regular
from mmfast.errors import UserError
from mmfast.files import write_atomically
from mmfast.models import Encoder, LinearHead, Projector
from mmfast.tasks import Task, task_of
from mmfast.training.checkpoint import RECORD, read_checkpoint
from mmfast.training.encoder import make_encoder
from mmfast.training.handover import load_part
from mmfast.training.model_section import encoder_name
from mmfast.training.parsing import config_of

FORMAT = "mmfast-weights 1"
# Parts of a network that are of use without its training, as far as it has them.
KEPT = ("encoder", "head", "projector")


class TrainedEncoder(nn.Module):
    """An encoder with the standardisation of its training, and the head or projector that it was trained with.

    Attributes:
        encoder: of standardised batches.
        head: (B, out_features) -> (B, task.outputs), or None where it was trained without labels.
        projector: (B, out_features) -> (B, D), or None.
        task: what the head's outputs are, or None.
        standardiser: as it was fitted on the training samples.
    """

    def __init__(
        self,
        encoder: Encoder,
        standardiser: Standardiser,
        *,
        head: nn.Module | None = None,
        projector: nn.Module | None = None,
        task: Task | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.projector = encoder, head, projector
        self.standardiser, self.task = standardiser, task

    def forward(self, batch: MultimodalBatch) -> Tensor:
        """Fused vectors (B, out_features) of a batch as it is read, not standardised.

        Raises:
            UserError: other modalities or feature sizes than those of training.
        """
        batch = self.standardiser.transform(batch)
        return self.encoder(batch.values, batch.lengths, batch.padding)

    def predict(self, batch: MultimodalBatch) -> Tensor:
        """Predictions (B, columns) of its task for a batch as it is read.

        Raises:
            UserError: an encoder that was trained without labels.
        """
        if self.head is None:
            raise UserError("TrainedEncoder.predict: there must be a head, got one trained without labels")
        return self.task.predictions(self.head(self(batch)))


def export(checkpoint: str | os.PathLike, out: str | os.PathLike = "encoder.safetensors") -> int:
    """Write the encoder of a checkpoint, and its head or projector, as safetensors; returns the number of tensors.

    Tensors keep their names, ``encoder.*``, ``head.*`` and ``projector.*``. The metadata hold JSON under ``mmfast``:
    ``format``, which is ``mmfast-weights 1``; ``model``, the encoder's class, its arguments and the widths of the
    projector; ``features``, modality -> F; ``standardiser``, modality -> mean, scale (1 / std, 0 for constant
    features), steps, nan, inf; ``task``, null without labels. Nothing of the run, its data or its folders.

    Args:
        checkpoint: of any stage.
        out: the file; one that is there is replaced when the new one is complete.

    Raises:
        UserError: not a checkpoint of mmfast, a file that cannot be written, or that is the checkpoint.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    loaded = read_checkpoint(checkpoint)
    if out.exists() and out.samefile(checkpoint):
        raise UserError(f"export: out must be another file than the checkpoint, got {out}")
    record = loaded[RECORD]
    network = {
        "format": FORMAT,
        "model": record["config"]["model"],
        "features": record["features"],
        "standardiser": {m: _listed(state) for m, state in record["standardiser"].items()},
        "task": record["task"],
    }
    # One memory each: weights that are shared are written twice.
    tensors = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in loaded["state_dict"].items()
        if name.partition(".")[0] in KEPT
    }
    content = _safetensors(str(out)).torch.save(tensors, {RECORD: json.dumps(network)})
    write_atomically(out, content)
    return len(tensors)


def load_encoder(path: str | os.PathLike, encoder: str | None = None) -> TrainedEncoder:
    """What :func:`export` wrote, in evaluation mode on the CPU.

    No code of the file runs, and no module is imported because a file names it.

    Args:
        path: the file.
        encoder: import path of the encoder's class, such as ``my.module.MyEncoder``, where it is not one of
            :mod:`mmfast.models.encoders`: it must be the one that the file names.

    Raises:
        UserError: no such file, one that is damaged or not by :func:`export`, or of another class.
    """
    path = Path(path)
    tensors, network = _read(path)
    try:
        model, features, state = network["model"], network["features"], network["standardiser"]
        named = encoder_name({"model": model})
        if ("." in named or encoder is not None) and named != encoder:
            hint = (
                f'load_encoder(path, encoder="{named}") imports it' if encoder is None else f"got {encoder}"
            )
            raise UserError(f"its encoder is of the class {named}: {hint}")
        config = config_of({"model": model}).model
        trained = TrainedEncoder(
            make_encoder(config, features),
            Standardiser().load_state_dict({m: _tensors(values) for m, values in state.items()}),
            task=network["task"] and task_of(network["task"]),
        )
        width = trained.encoder.out_features
        parts = {name.partition(".")[0] for name in tensors}
        if "head" in parts:
            trained.head = LinearHead(width, trained.task.outputs)
        if "projector" in parts:
            trained.projector = Projector(width, config.projector)
        for part in ("encoder", *(parts - {"encoder"})):
            load_part(getattr(trained, part), tensors, part, "its tensors")
    except (UserError, KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = error if isinstance(error, UserError) else f"its description is damaged ({error!r})"
        raise UserError(f"{path}: {reason}") from None
    return trained.eval()


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    library = _safetensors(str(path))
    regular(path)
    try:
        with library.safe_open(path, framework="pt") as file:
            network = json.loads((file.metadata() or {}).get(RECORD, "null"))
            found = network.get("format") if isinstance(network, dict) else None
            if found != FORMAT:
                raise UserError(f"{path}: format must be {FORMAT!r}, got {found!r}")
            return {name: file.get_tensor(name) for name in file.keys()}, network  # noqa: SIM118
    except UserError:
        raise
    except (library.SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not a readable safetensors file, truncated or of another kind ({error})"
        ) from None


def _safetensors(path: str):
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(f"{path}: weights need safetensors, install mmfast[train] or safetensors") from None
    return safetensors


def _listed(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in state.items()}


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: torch.tensor(value, dtype=torch.float64, device="cpu") if isinstance(value, list) else value
        for key, value in state.items()
    }
