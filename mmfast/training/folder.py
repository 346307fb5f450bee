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
from mmfast.training.config import differences
from mmfast.training.environment import environment
from mmfast.training.parsing import load_yaml, save_yaml
from mmfast.training.processes import agreed, is_main, rank

CONFIG, ENVIRONMENT, INPUTS = "config.yaml", "environment.yaml", "inputs.yaml"
RESULT, PREDICTIONS = "result.json", "predictions.csv"
# Settings that cannot change a result, and paths whose content is compared instead.
IDLE = (
    "run.folder",
    "run.progress",
    "run.tensorboard",
    "run.checkpoint_seconds",
    "experiment.workers",
    *(f"data.{name}" for name in ("path", "pool", "embedding", "labels_from")),
    "from",
)


def examine(
    folder: Path, settings: Mapping[str, Any], resume: bool | None, inputs: Mapping[str, Any] | None = None
) -> bool:
    """Whether ``folder`` holds a run of these settings to go on with; changes nothing.

    A folder holds a run from its first checkpoint on. What stopped before has computed nothing, so the same command
    starts anew, with other settings if need be.

    Args:
        settings, resume, inputs: as for :func:`claim`; without ``inputs`` they are not compared.

    Of several processes the first one looks, and all hear what it found.

    Raises:
        UserError: as :func:`claim`, except for what only writing tells.
    """
    return agreed(lambda: _examine(folder, settings, resume, inputs))


def _examine(
    folder: Path, settings: Mapping[str, Any], resume: bool | None, inputs: Mapping[str, Any] | None
) -> bool:
    found = (folder / CONFIG).exists()
    if resume is True and not found:
        raise UserError(f"run.folder {folder}: there is no run to resume")
    # A config.yaml without the rest of a claim is a file of the user's, not to be overwritten.
    held = found and (not (folder / ENVIRONMENT).exists() or _has_outcome(folder))
    if resume is False and held:
        raise UserError(
            f"run.folder {folder}: holds a run already; go on with it by --resume, or name another folder"
        )
    if not (held or resume is True):
        return False
    for name, before, now in differences(load_yaml(folder / CONFIG), settings, IDLE):
        raise UserError(
            f"run.folder {folder}: its run has {name} = {before}, got {now}; name another folder for a new run"
        )
    if inputs is not None and (folder / INPUTS).exists():
        for name, before, now in differences(load_yaml(folder / INPUTS), inputs):
            raise UserError(
                f"run.folder {folder}: {name} must be what its run read, with the fingerprint {before}, got {now}; "
                "name another folder for a new run"
            )
    return True


@contextlib.contextmanager
def claim(
    folder: Path, settings: Mapping[str, Any], resume: bool | None, inputs: Mapping[str, Any]
) -> Iterator[Path]:
    """Own ``folder`` for one run of ``settings``, so that two runs never mix.

    To be entered when data and settings have been accepted and everything is built: what is refused leaves no folder.
    Of several processes the first one owns it; the others wait for that, and must see the folder and read the same.

    Args:
        folder: created when it does not exist.
        settings: the configuration, written to ``config.yaml`` with ``environment.yaml`` beside it.
        resume: whether to go on with a run found there; None means as it may be.
        inputs: fingerprints of what the run reads, such as its data; written to ``inputs.yaml``. Their paths may
            change, their content may not.

    Raises:
        UserError: the folder holds a run and ``resume`` is False, or no run and it is True; the settings or inputs
            differ from those of the run found; another process is at work in it; it cannot be written.
    """
    if is_main():
        with _lock(folder):
            if not _examine(folder, settings, resume, inputs):
                save_yaml(folder / ENVIRONMENT, environment())
                save_yaml(folder / INPUTS, inputs)
                save_yaml(folder / CONFIG, settings)
            agreed(lambda: dict(inputs))
            yield folder
        return
    for name, first, own in differences(agreed(dict), inputs):
        raise UserError(
            f"run: {name} must hold the same for all processes, got the fingerprint {own} in process {rank()} and "
            f"{first} in process 0"
        )
    if not (folder / CONFIG).exists():
        raise UserError(
            f"run.folder {folder}: must be seen by all processes, and process {rank()} does not find it"
        )
    yield folder


def _has_outcome(folder: Path) -> bool:
    return any(any(folder.rglob(pattern)) for pattern in ("*.ckpt", RESULT))


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


def finished(
    folder: Path, settings: Mapping[str, Any], inputs: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """The result of a complete run of these settings, or None; nothing that it was made from need be there still."""
    return load_result(folder) if examine(folder, settings, None, inputs) else None


def load_result(folder: Path) -> dict[str, Any] | None:
    """The result of a complete run, or None; of several processes the first one looks."""
    path = folder / RESULT
    return agreed(lambda: json.loads(path.read_text()) if path.exists() else None)
