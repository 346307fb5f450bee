"""Where work stands and how long it will take: a bar on a terminal, plain lines elsewhere if they are asked for."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

# Least time between two plain lines, and between two messages of a run.
LINE_SECONDS, MESSAGE_SECONDS = 5.0, 0.2


class Standing(NamedTuple):
    """Where a run stands: the share of its steps that is done, and where that is, in words."""

    share: float
    text: str


Listener = Callable[[Standing], None]
_listener: Listener | None = None


@contextlib.contextmanager
def heard(listener: Listener) -> Iterator[None]:
    """Within the context, training runs of this process tell ``listener`` instead of drawing bars of their own."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


@contextlib.contextmanager
def of_a_run(mode: str, at_most: bool) -> Iterator[Listener | None]:
    """Who is to be told about a run: the listener, a bar, or nobody.

    Args:
        mode: ``run.progress``.
        at_most: the run may stop before its last epoch.
    """
    if _listener is not None:
        yield _listener
        return
    with bar(mode, "at most" if at_most else "about") as tell:
        yield tell


@contextlib.contextmanager
def bar(mode: str, about: str = "about") -> Iterator[Listener | None]:
    """A function that shows a :class:`Standing` with the time left, or None where nothing is to be shown.

    Args:
        mode: ``auto``: a bar on a terminal, else nothing; ``on``: a bar on a terminal, else lines; ``off``: nothing.
        about: how good the estimate is.
    """
    terminal = sys.stdout.isatty()
    if mode == "off" or not (terminal or mode == "on"):
        yield None
        return
    clock = Clock()
    if not terminal:
        yield Lines(clock, about)
        return
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    columns = (
        TextColumn("{task.percentage:3.0f} %", table_column=Column(min_width=5)),
        BarColumn(table_column=Column(min_width=10, max_width=30)),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns) as shown:
        task = shown.add_task("starting", total=1.0)

        def tell(standing: Standing) -> None:
            shown.update(task, completed=standing.share, description=_with_time(standing, clock, about))

        yield tell


class Board:
    """Many runs as one standing.

    Args:
        costs: run -> what it may cost, in any unit.
        tell: is told the share of all costs, the number of complete runs, and where the run stands that was heard of.
    """

    def __init__(self, costs: Mapping[str, float], tell: Listener) -> None:
        self._costs, self._tell = dict(costs), tell
        self._shares = dict.fromkeys(costs, 0.0)

    def complete(self, run: str) -> None:
        """The run was complete before the clock started."""
        self._shares[run] = 1.0

    def __call__(self, run: str, standing: Standing) -> None:
        self._shares[run] = standing.share
        done = sum(self._costs[name] * share for name, share in self._shares.items()) / sum(
            self._costs.values()
        )
        complete = sum(share >= 1 for share in self._shares.values())
        self._tell(Standing(done, f"{complete} of {len(self._shares)} runs; {run}: {standing.text}"))


class Lines:
    """Lines on standard output, not more often than every ``LINE_SECONDS``."""

    def __init__(self, clock: Clock, about: str) -> None:
        self._clock, self._about = clock, about
        self._said = -LINE_SECONDS

    def __call__(self, standing: Standing) -> None:
        now = time.monotonic()
        text = _with_time(standing, self._clock, self._about)
        if now - self._said >= LINE_SECONDS or standing.share >= 1:
            print(f"{100 * standing.share:3.0f} %  {text}", flush=True)
            self._said = now


class Clock:
    """Time left, from the share of the work done since it was first asked; what was done before is no guide."""

    def __init__(self) -> None:
        self._start: tuple[float, float] | None = None

    def left(self, share: float, now: float | None = None) -> float | None:
        """Seconds, None as long as nothing was done."""
        now = time.monotonic() if now is None else now
        if self._start is None:
            self._start = (now, share)
        began, before = self._start
        return None if share <= before else (now - began) * (1 - share) / (share - before)


def _with_time(standing: Standing, clock: Clock, about: str) -> str:
    left = clock.left(standing.share)
    return standing.text if not left else f"{about} {duration(left)} left; {standing.text}"


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 5 min."""
    minutes, hours = round(seconds / 60), round(seconds / 60) // 60
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if hours == 0 else f"{hours} h {minutes % 60} min"


class Telling(Callback):
    """Tells a listener after each step: epoch k of n, and the latest loss."""

    def __init__(self, tell: Listener) -> None:
        self._tell, self._told, self._text = tell, 0.0, ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._text = _epoch(trainer)
        self._tell(Standing(trainer.current_epoch / trainer.max_epochs, self._text))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, last = time.monotonic(), batch_idx + 1 == trainer.num_training_batches
        if now - self._told < MESSAGE_SECONDS and not last:
            return
        self._told = now
        # As if validation and checkpoint were one more batch.
        done = trainer.current_epoch + (batch_idx + 1) / (trainer.num_training_batches + 1)
        if outputs:
            self._text = f"{_epoch(trainer)}, loss {outputs['loss'].item():.4g}"
        self._tell(Standing(done / trainer.max_epochs, self._text))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(Standing(1.0, self._text))


def _epoch(trainer: pl.Trainer) -> str:
    return f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
