"""One training run by Lightning's Trainer: checkpoints, logs, early stopping, exact resumption."""

from __future__ import annotations

import contextlib
import logging
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch.utils.data import DataLoader

from mmfast.errors import UserError
from mmfast.training import bars
from mmfast.training.checkpoint import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint, read_checkpoint
from mmfast.training.config import RunConfig
from mmfast.training.history import History

LAST, BEST, LOGS = "last.ckpt", "best.ckpt", "logs"


def fit(
    module: pl.LightningModule,
    train: DataLoader,
    valid: DataLoader | None,
    folder: Path,
    run: RunConfig,
    epochs: int,
    monitor: str | None = None,
    better: str = "lower",
    patience: int | None = None,
) -> list[dict[str, float]]:
    """Train, or go on where ``folder/last.ckpt`` stopped, to the same weights bit by bit.

    A killed run repeats what came after its latest checkpoint. That the repetition is exact rests on every draw being
    a function of (seed, step) or (seed, epoch).

    Args:
        module: what to train; at the end it holds the last epoch's weights.
        train, valid: batches; ``valid`` may be None when nothing is monitored.
        folder: takes the checkpoints and ``logs/``.
        run: device, precision, loggers, progress bar.
        epochs: the most epochs.
        monitor: logged quantity by which ``best.ckpt`` is kept and training stops.
        better: whether it is to be ``lower`` or ``higher``.
        patience: epochs without improvement before training stops; None if it never does.

    Returns:
        What was logged in each epoch, over all sittings.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the latest checkpoint is kept.
    """
    history = History()
    callbacks: list[Callback] = [history]
    if monitor is not None:
        mode = {"lower": "min", "higher": "max"}[better]
        if patience is not None:
            callbacks.append(
                EarlyStopping(monitor, mode=mode, patience=patience, check_on_train_epoch_end=True)
            )
        callbacks.append(BestCheckpoint(folder, BEST, monitor, mode))
    # Written after the callbacks above have seen the epoch, for it holds their state.
    callbacks.append(LastCheckpoint(folder / LAST, run.checkpoint_seconds))

    last = folder / LAST
    start = last if last.exists() else None
    if start is not None:
        checkpoint = read_checkpoint(start)
        if _finished(checkpoint, epochs, patience):
            module.load_state_dict(checkpoint["state_dict"])
            return checkpoint["callbacks"][history.state_key]["epochs"]
        # Lightning makes the first iterator before it tells the sampler the epoch.
        train.batch_sampler.set_epoch(checkpoint["epoch"] + 1)
    with _quiet(), _interruptible(), bars.of_a_run(run.progress, at_most=patience is not None) as tell:
        if tell is not None:
            callbacks.append(bars.Telling(tell))
        trainer = _trainer(
            run,
            max_epochs=epochs,
            logger=_loggers(folder, run),
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=False,
        )
        trainer.fit(module, train, valid, ckpt_path=start)
    return history.epochs


def check_device(run: RunConfig) -> None:
    """Refuse a device that is not there, and a precision that it does not have.

    Raises:
        UserError: as said.
    """
    with _quiet():
        try:
            trainer = _trainer(run, logger=False, enable_checkpointing=False, enable_progress_bar=False)
        except MisconfigurationException as error:
            raise UserError(
                f"config: run.accelerator must be a device that this machine has, got {run.accelerator}"
            ) from error
    # Lightning itself takes bfloat16 where a CPU is asked for float16.
    if trainer.precision != run.precision:
        raise UserError(
            f"config: run.precision must be one that the device {trainer.strategy.root_device.type} has, "
            f"such as {trainer.precision}, got {run.precision}"
        )


def _trainer(run: RunConfig, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator=run.accelerator,
        devices=1,
        precision=run.precision,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


def _finished(checkpoint: dict, epochs: int, patience: int | None) -> bool:
    stopping = (s for key, s in checkpoint["callbacks"].items() if key.startswith("EarlyStopping"))
    return checkpoint["epoch"] + 1 >= epochs or any(s["wait_count"] >= patience for s in stopping)


def _loggers(folder: Path, run: RunConfig) -> list[Logger]:
    # Each sitting logs to its own version, for CSVLogger clears the folder that it opens.
    csv = CSVLogger(folder, name=LOGS)
    return [csv, TensorBoardLogger(folder, name=LOGS, version=csv.version)] if run.tensorboard else [csv]


@contextlib.contextmanager
def _quiet():
    """Without Lightning's advertisements and hints, which are about choices already made here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _interruptible():
    """Ctrl-C and SIGTERM as KeyboardInterrupt.

    Lightning turns the one into exit status 1, ignoring further ones, and the other into exit status 0.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if isinstance(error, SIGTERMException) or isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        with contextlib.suppress(ValueError):  # only the main thread has handlers
            signal.signal(signal.SIGINT, handler)
