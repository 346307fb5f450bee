"""One training run by Lightning's Trainer: checkpoints, logs, early stopping, exact resumption."""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import nn
from torch.cuda import device_count as cuda_device_count
from torch.utils.data import DataLoader

from mmfast.errors import UserError
from mmfast.models.layers.batch_norm import share_batch_norm, unshare_batch_norm
from mmfast.training import bars
from mmfast.training.checkpoint import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint, read_checkpoint
from mmfast.training.config import RunConfig
from mmfast.training.history import History
from mmfast.training.joining import environment_plugins, quiet
from mmfast.training.launched import several
from mmfast.training.processes import agreed

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
    callbacks: list[Callback] = [history, *([_Termination()] if several(run) else [])]
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
    start = last if agreed(last.exists) else None
    if start is not None:
        checkpoint = read_checkpoint(start)
        if _finished(checkpoint, epochs, patience):
            module.load_state_dict(checkpoint["state_dict"])
            return checkpoint["callbacks"][history.state_key]["epochs"]
        # Lightning makes the first iterator before it tells the sampler the epoch.
        train.batch_sampler.set_epoch(checkpoint["epoch"] + 1)
    with quiet(), _interruptible(), bars.of_a_run(run.progress, at_most=patience is not None) as tell:
        if tell is not None:
            callbacks.append(bars.Telling(tell))
        trainer = _trainer(
            run,
            max_epochs=epochs,
            logger=_loggers(folder, run),
            callbacks=callbacks,
            checkpoints=AtomicCheckpointIO(),
            enable_progress_bar=False,
        )
        trainer.fit(module, train, valid, ckpt_path=start)
    return history.epochs


def check_device(run: RunConfig) -> None:
    """Refuse a device that is not there, and a precision that it does not have.

    Raises:
        UserError: as said.
    """
    with quiet():
        try:
            trainer = _trainer(run, logger=False, enable_checkpointing=False, enable_progress_bar=False)
        except (MisconfigurationException, ValueError) as error:
            here = cuda_device_count() if run.accelerator in ("auto", "cuda") else 1
            if 0 < here < run.devices:
                raise UserError(
                    f"config: run.devices must be at most the {here} GPUs of this machine, got {run.devices}"
                ) from error
            raise UserError(
                f"config: run.accelerator must be a device that this machine has"
                f"{' and that takes several processes' if several(run) else ''}, got {run.accelerator}"
            ) from error
    # Lightning itself takes bfloat16 where a CPU is asked for float16.
    if trainer.precision != run.precision:
        raise UserError(
            f"config: run.precision must be one that the device {trainer.strategy.root_device.type} has, "
            f"such as {trainer.precision}, got {run.precision}"
        )


class _OverProcesses(LayerSync):
    """Batch normalisation over the rows of all processes, while they train."""

    def apply(self, model: nn.Module) -> nn.Module:
        return share_batch_norm(model)

    def revert(self, model: nn.Module) -> nn.Module:
        return unshare_batch_norm(model)


def _trainer(run: RunConfig, checkpoints: CheckpointIO | None = None, **options: Any) -> pl.Trainer:
    plugins = environment_plugins() + ([checkpoints] if checkpoints else [])
    if several(run):
        # A process whose samples all lack a modality may use fewer parameters than another. Buffers need no copying:
        # statistics are over all processes.
        options["strategy"] = DDPStrategy(find_unused_parameters=True, broadcast_buffers=False)
        plugins.append(_OverProcesses())
    return pl.Trainer(
        accelerator=run.accelerator,
        devices=run.devices,
        num_nodes=run.nodes,
        precision=run.precision,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        use_distributed_sampler=False,
        plugins=plugins,
        **options,
    )


def _finished(checkpoint: dict, epochs: int, patience: int | None) -> bool:
    stopping = (s for key, s in checkpoint["callbacks"].items() if key.startswith("EarlyStopping"))
    return checkpoint["epoch"] + 1 >= epochs or any(s["wait_count"] >= patience for s in stopping)


def _loggers(folder: Path, run: RunConfig) -> list[Logger]:
    # Each sitting logs to its own version, for CSVLogger clears the folder that it opens.
    csv = CSVLogger(folder, name=LOGS)
    return [csv, TensorBoardLogger(folder, name=LOGS, version=csv.version)] if run.tensorboard else [csv]


class _Termination(Callback):
    """SIGTERM interrupts as Ctrl-C does.

    Lightning would broadcast it within the handler, which may meet another collective of the other processes.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)


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
