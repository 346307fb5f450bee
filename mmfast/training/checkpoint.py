"""Checkpoints: written whole or not at all, read without running code, refused when they are not ours."""

from __future__ import annotations

import hashlib
import io
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from mmfast.errors import UserError
from mmfast.files import write_atomically
from mmfast.training.processes import agreed

# The entry that says what a checkpoint is, and what that holds.
RECORD = "mmfast"
KEYS = ("kind", "config", "stage", "features", "standardiser", "task", "data", "seen")


class AtomicCheckpointIO(CheckpointIO):
    """Saves through :func:`~mmfast.files.write_atomically`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options: Any = None) -> None:
        # Serialised in memory first: torch's own writer reports a full disk as an unspecific RuntimeError.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(path, buffer.getbuffer())

    def load_checkpoint(
        self, path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path) -> None:
        Path(path).unlink(missing_ok=True)


class BestCheckpoint(ModelCheckpoint):
    """``<name>`` in a run's folder: the weights of the epoch with the best ``monitor``, overwritten in place.

    Unlike its base it keeps its state when the run's folder was moved between two sittings.
    """

    def __init__(self, folder: str | os.PathLike, name: str, monitor: str, mode: str) -> None:
        super().__init__(
            dirpath=folder,
            filename=Path(name).stem,
            monitor=monitor,
            mode=mode,
            save_weights_only=True,
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(self.dirpath) / Path(path).name) if path else path

        moved = dict(state_dict, dirpath=self.dirpath)
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            moved[key] = here(state_dict[key])
        moved["best_k_models"] = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(moved)


class LastCheckpoint(Checkpoint):
    """``<name>`` in a run's folder: everything that resuming needs, written at ends of epochs.

    Args:
        path: the file.
        seconds: not sooner than so long after the previous time, except at the end of training. Short epochs would
            otherwise spend their time on the disk.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self._saved = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ends = trainer.should_stop or trainer.current_epoch + 1 >= trainer.max_epochs
        # By one clock: all processes take part in a save.
        if ends or agreed(lambda: time.monotonic() - self._saved >= self.seconds):
            trainer.save_checkpoint(self.path)
            self._saved = time.monotonic()


def fingerprint(path: str | os.PathLike) -> str:
    """32 hexadecimal digits for the content of a file."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


def read_checkpoint(path: str | os.PathLike, kind: str | None = None) -> dict[str, Any]:
    """Load a checkpoint of this package onto the CPU, with ``weights_only=True``: no code in it can run.

    Args:
        path: the file.
        kind: ``pretraining`` or ``supervised``, or None for either.

    Raises:
        UserError: no such file, truncated, written by another program, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: {'is a folder' if path.is_dir() else 'no such file'}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"checkpoint {path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # torch names no type for what a damaged or foreign file may raise
        raise UserError(f"checkpoint {path}: truncated, or not a checkpoint that mmfast wrote") from error
    record = checkpoint.get(RECORD) if isinstance(checkpoint, dict) else None
    if not isinstance(record, dict) or "state_dict" not in checkpoint:
        raise UserError(f"checkpoint {path}: not written by mmfast, it holds no {RECORD!r} record")
    missing = [key for key in KEYS if key not in record]
    if missing:
        raise UserError(
            f"checkpoint {path}: written by another version of mmfast, its record lacks {missing[0]!r}"
        )
    if kind is not None and record["kind"] != kind:
        raise UserError(f"checkpoint {path}: must be of a {kind} run, got one of a {record['kind']} run")
    return checkpoint
