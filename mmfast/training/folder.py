"""The folder of a run: who owns it, what lies where."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmfast.errors import UserError
from mmfast.files import write_json
from mmfast.training.config import first_difference
from mmfast.training.environment import environment
from mmfast.training.parsing import load_yaml, save_yaml

CONFIG, ENVIRONMENT, RESULT, PREDICTIONS = "config.yaml", "environment.yaml", "result.json", "predictions.csv"
# Settings that cannot change a result.
IDLE = ("run.folder", "run.progress", "run.tensorboard", "run.checkpoint_seconds", "experiment.workers")


@contextlib.contextmanager
def claim(folder: Path, settings: Mapping[str, Any], resume: bool | None) -> Iterator[Path]:
    """Own ``folder`` for one run of ``settings``, so that two runs never mix.

    Args:
        folder: created when it does not exist.
        settings: the configuration, written to ``config.yaml`` with ``environment.yaml`` beside it.
        resume: whether to go on with a run found there; None means as it may be.

    Raises:
        UserError: the folder holds a run and ``resume`` is False, or no run and it is True; the settings differ from
            those of the run found; another process is at work in it; it cannot be written.
    """
    config = folder / CONFIG
    if resume is True and not config.exists():
        raise UserError(f"run.folder {folder}: there is no run to resume")
    if resume is False and config.exists():
        raise UserError(
            f"run.folder {folder}: holds a run already; go on with it by --resume, or name another folder"
        )
    with _lock(folder):
        if config.exists():
            _same(folder, load_yaml(config), settings)
        else:
            save_yaml(folder / ENVIRONMENT, environment())
            save_yaml(config, settings)
        yield folder


def _same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    name = first_difference(before, now, IDLE)
    if name is not None:
        values = [_get(mapping, name) for mapping in (before, now)]
        raise UserError(
            f"run.folder {folder}: its run has {name} = {values[0]}, got {values[1]}; "
            "name another folder for a new run"
        )


def _get(mapping: Any, name: str) -> Any:
    for key in name.split("."):
        mapping = mapping.get(key) if isinstance(mapping, Mapping) else None
    return mapping


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115 - held open for as long as the lock
    except OSError as error:
        raise UserError(f"run.folder {folder}: cannot be used: {error.strerror}") from error
    with file:
        try:
            # The system drops the lock with the process, however it ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"run.folder {folder}: another process is running in it") from error
        except OSError as error:
            raise UserError(f"run.folder {folder}: cannot be locked: {error.strerror}") from error
        yield


def save_result(folder: Path, result: Mapping[str, Any]) -> None:
    """``result.json``: its presence says that the run is complete."""
    write_json(folder / RESULT, result)


def load_result(folder: Path) -> dict[str, Any] | None:
    """The result of a complete run, or None."""
    path = folder / RESULT
    return json.loads(path.read_text()) if path.exists() else None
