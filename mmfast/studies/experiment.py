"""Methodologies compared over seeds and folds."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmfast.data import MultimodalData
from mmfast.errors import UserError
from mmfast.studies.baselines import BASELINES
from mmfast.training import bars, runs
from mmfast.training.config import Config, ExperimentConfig
from mmfast.training.fitting import LAST
from mmfast.training.folder import PREDICTIONS, claim, examine, finished, load_result, save_result
from mmfast.training.parsing import config_of
from mmfast.training.predictions import measure, read_predictions, write_predictions
from mmfast.training.splits import Splits, identity, load_data, make_splits, require_labels
from mmfast.training.stages import pretraining_stage, supervised_stage

log = logging.getLogger(__name__)

PRETRAINED = "pretraining"


class Method(NamedTuple):
    """A methodology of thesis section 7.1."""

    title: str
    pretrained: bool
    frozen: bool


METHODS = {
    "FS": Method("fully supervised", pretrained=False, frozen=False),
    "SLE": Method("linear evaluation of a random encoder", pretrained=False, frozen=True),
    "SSL": Method("self-supervised pre-training, then fine-tuning", pretrained=True, frozen=False),
    "LE": Method("linear evaluation of the pre-trained encoder", pretrained=True, frozen=True),
}
TITLES = {name: method.title for name, method in METHODS.items()} | {
    "ridge": "ridge regression on time means",
    "constant": "median training label",
}


class Unit(NamedTuple):
    """What shares one split and one pre-training run. ``fold`` is None for data with a test split."""

    seed: int
    fold: int | None

    def folder(self, root: Path) -> Path:
        return root / f"seed{self.seed}" / ("" if self.fold is None else f"fold{self.fold}")

    def config(self, config: Config) -> Config:
        """The experiment's configuration for this unit's runs."""
        # The thread count decides bits of the results, so it must not follow the machine's.
        run = replace(config.run, seed=self.seed, threads=config.run.threads or 1, progress="off")
        data = config.data if self.fold is None else replace(config.data, fold=self.fold)
        return replace(config, run=run, data=data)

    def __str__(self) -> str:
        return f"seed {self.seed}" + ("" if self.fold is None else f", fold {self.fold}")


@dataclass(frozen=True)
class Outcome:
    """One methodology's run under one seed, over all folds.

    Attributes:
        seed: of the run.
        names, predictions, truths: (N,) of every test sample; with folds, each sample is predicted by the run that
            did not train on it, and all are pooled before any metric is computed.
        metrics: name -> value on them.
        results: the runs' ``result.json``, one per fold.
    """

    seed: int
    names: list[str]
    predictions: Any
    truths: Any
    metrics: dict[str, float]
    results: list[dict[str, Any]]


def run_experiment(config: Config, experiment: ExperimentConfig) -> dict[str, list[Outcome]]:
    """Run what is not yet complete in ``config.run.folder``; goes on where an earlier sitting stopped.

    Each unit of (seed, fold) pre-trains once, for all methodologies that ask for it. Random weights of a seed are the
    same for all methodologies.

    Returns:
        Row of the table -> one outcome per seed. Ridge regression and the constant know no chance, so they have
        one outcome, or one per seed when the seed chooses the labels (``data.label_share``).

    Raises:
        UserError: as any of the runs, or a folder that holds another experiment.
    """
    root = Path(config.run.folder)
    settings = {**asdict(config), "experiment": asdict(experiment)}
    begun = examine(root, settings, resume=None)
    data = load_data(config.data)
    units = units_of(config, experiment, data)
    workers = min(experiment.workers or _workers(config), len(units))
    if not begun:
        _accept(config, experiment, units, data, workers)
    with claim(root, settings, None, {"data.path": identity(data)}):
        began = time.monotonic()
        with bars.bar(config.run.progress) as tell:
            board = tell and _board(config, experiment, units, data, tell)
            _run_all(config, experiment, units, workers, board)
        log.info("all runs complete after %.0f s", time.monotonic() - began)
    return collect(config, experiment, units, data.label_range)


def units_of(config: Config, experiment: ExperimentConfig, data: MultimodalData) -> list[Unit]:
    """All units of an experiment, seed by seed."""
    folds = [None] if data.cross_validation is None else range(config.data.folds)
    return [Unit(seed, fold) for seed in experiment.seeds for fold in folds]


def _accept(
    config: Config, experiment: ExperimentConfig, units: list[Unit], data: MultimodalData, workers: int
) -> None:
    """Refuse what any of the runs would, before the first of them starts."""
    methods = [METHODS[name] for name in experiment.methods]
    sentences = {}
    # Folds differ in their samples; seeds only choose among them.
    for unit in (unit for unit in units if unit.seed == units[0].seed):
        own = unit.config(config)
        splits = make_splits(data, own.data, unit.seed)
        require_labels({"train": splits.train, "valid": splits.valid, "test": splits.test})
        if any(method.pretrained for method in methods):
            stage = pretraining_stage(own)
            runs.prepare(own, stage, splits, processes=workers)
            sentences[runs.few_steps(stage, splits)] = None
        module = runs.prepare(own, supervised_stage(own), splits, processes=workers).module
        for name, count in runs.tested_on_seen(module, splits).items():
            sentences[f"{unit}: of the {len(getattr(splits, name))} {name} samples, {count}"] = None
    for sentence in filter(None, sentences):
        log.info("warning: %s", sentence)


def _board(
    config: Config,
    experiment: ExperimentConfig,
    units: list[Unit],
    data: MultimodalData,
    tell: bars.Listener,
) -> bars.Board:
    """All networks' runs, with the numbers of samples that pass through an encoder as costs."""
    first = units[0].config(config)
    splits = make_splits(data, first.data, first.run.seed)
    labelled = len(splits.train) + len(splits.valid)
    costs = {
        name: labelled if METHODS[name].frozen else config.supervised.epochs * labelled
        for name in experiment.methods
    }
    if any(METHODS[name].pretrained for name in experiment.methods):
        costs[PRETRAINED] = 2 * config.pretraining.epochs * len(splits.inputs)
    board = bars.Board({f"{unit}, {name}": cost for unit in units for name, cost in costs.items()}, tell)
    for unit in units:
        for name in costs:
            if load_result(unit.folder(Path(config.run.folder)) / name) is not None:
                board.complete(f"{unit}, {name}")
    return board


def _run_all(
    config: Config,
    experiment: ExperimentConfig,
    units: list[Unit],
    workers: int,
    board: bars.Board | None,
) -> None:
    arguments = (asdict(config), asdict(experiment))
    if workers == 1:
        for unit in units:
            _run_unit(*arguments, unit, board)
        return
    # Fresh processes: forking one whose OpenMP threads have run deadlocks.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with (
        _messages(context, board) as queue,
        ProcessPoolExecutor(
            workers,
            context,
            initializer=_start_worker,
            initargs=(os.getpid(), log.getEffectiveLevel(), queue),
        ) as pool,
    ):
        futures = [pool.submit(_run_unit, *arguments, unit) for unit in units]
        try:
            for future in as_completed(futures):
                future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "experiment: a worker was killed, perhaps for memory; the same command goes on"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            # Not asked to finish, which takes minutes: a run survives a kill at any moment.
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise


@contextlib.contextmanager
def _messages(context: Any, board: bars.Board | None) -> Iterator[Any]:
    """A queue of what workers have to say: runs with their standings for the board, None with lines for the log."""
    if board is None:
        yield None
        return
    queue = context.Queue()

    def read() -> None:
        while (message := queue.get()) is not None:
            run, said = message
            if run is None:
                log.info(said)
            else:
                board(run, said)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield queue
    finally:
        queue.put(None)
        # Not for ever: a worker that was killed while it wrote leaves the queue locked.
        reader.join(timeout=5)


class _ToParent(logging.Handler):
    """Lets the parent write the line, above its bar."""

    def emit(self, record: logging.LogRecord) -> None:
        _queue.put((None, self.format(record)))


# How this process tells the board where a run stands, if it was started as a worker.
_queue: Any = None


def _start_worker(parent: int, level: int, queue: Any) -> None:
    """Log to the parent or its standard output, and end soon after the parent was killed.

    A worker that lives on would keep its run's folder locked until the run is done.
    """
    global _queue
    _queue = queue
    log.addHandler(logging.StreamHandler(sys.stdout) if queue is None else _ToParent())
    log.setLevel(level)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _workers(config: Config) -> int:
    on_cpu = config.run.accelerator == "cpu" or not torch.cuda.is_available()
    if not on_cpu:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_unit(
    config: dict[str, Any], experiment: dict[str, Any], unit: Unit, board: bars.Board | None = None
) -> None:
    """All of a unit's runs that are not complete yet, perhaps in a process of their own."""
    if _queue is not None:
        board = _send
    config, experiment = unit.config(config_of(config)), ExperimentConfig(**experiment)
    root = Path(config.run.folder)
    torch.set_num_threads(config.run.threads)
    splits = make_splits(load_data(config.data), config.data, unit.seed)
    if any(METHODS[name].pretrained for name in experiment.methods):
        with _heard(board, unit, PRETRAINED):
            result = _pretrain(_in(config, unit, root, PRETRAINED), splits)
        log.info("%s, pre-training: %d steps (%.0f s)", unit, result["steps"], result["seconds"])
    for name in experiment.methods:
        source = unit.folder(root) / PRETRAINED / LAST if METHODS[name].pretrained else None
        with _heard(board, unit, name):
            result = _finetune(_in(config, unit, root, name), splits, source, METHODS[name].frozen)
        _log(unit, name, result)
    if _has_baselines(config, experiment, unit.seed):
        for name in BASELINES:
            _log(unit, name, _baseline(name, unit.folder(root) / name, splits))


def _send(run: str, standing: bars.Standing) -> None:
    _queue.put((run, standing))


@contextlib.contextmanager
def _heard(board: Callable[[str, bars.Standing], None] | None, unit: Unit, name: str) -> Iterator[None]:
    """Within the context the board hears of the run, and at its end that it is complete."""
    if board is None:
        yield
        return
    run = f"{unit}, {name}"
    with bars.heard(lambda standing: board(run, standing)):
        yield
    board(run, bars.Standing(1.0, "complete"))


def _log(unit: Unit, name: str, result: dict[str, Any]) -> None:
    log.info("%s, %s: MAE %.3f (%.0f s)", unit, name, result["metrics"]["mae"], result["seconds"])


def _in(config: Config, unit: Unit, root: Path, name: str) -> Config:
    return replace(config, run=replace(config.run, folder=str(unit.folder(root) / name)))


def _pretrain(config: Config, splits: Splits) -> dict[str, Any]:
    folder, settings, inputs = Path(config.run.folder), asdict(config), {"data.path": splits.identity}
    if (done := finished(folder, settings, inputs)) is not None:
        return done
    return runs.run_stage(config, pretraining_stage(config), splits, claim(folder, settings, None, inputs))


def _finetune(config: Config, splits: Splits, source: Path | None, freeze: bool) -> dict[str, Any]:
    folder = Path(config.run.folder)
    # Relative, so that a moved experiment is still the same.
    settings = {**asdict(config), "from": source and os.path.relpath(source, folder), "freeze": freeze}
    inputs = {"data.path": splits.identity}
    if (done := finished(folder, settings, inputs)) is not None:
        return done
    place = claim(folder, settings, None, inputs)
    return runs.run_stage(config, supervised_stage(config, freeze), splits, place, source)


def _baseline(name: str, folder: Path, splits: Splits) -> dict[str, Any]:
    if (done := load_result(folder)) is not None:
        return done
    began = time.monotonic()
    predictions = torch.from_numpy(BASELINES[name](splits)).float()
    write_predictions(folder / PREDICTIONS, splits.test, predictions)
    metrics = measure(predictions, splits.test.labels, splits.label_range)
    result = {"kind": name, "seconds": round(time.monotonic() - began, 2), "metrics": metrics}
    save_result(folder, result)
    return result


def _has_baselines(config: Config, experiment: ExperimentConfig, seed: int) -> bool:
    return experiment.baselines and (config.data.label_share < 1 or seed == experiment.seeds[0])


def collect(
    config: Config, experiment: ExperimentConfig, units: list[Unit], label_range: tuple[float, float]
) -> dict[str, list[Outcome]]:
    """Outcomes of a complete experiment from its files, as :func:`run_experiment` returns them."""
    root = Path(config.run.folder)
    rows: dict[str, list[Outcome]] = {}
    for seed in experiment.seeds:
        baselines = list(BASELINES) if _has_baselines(config, experiment, seed) else []
        for name in [*experiment.methods, *baselines]:
            folders = [unit.folder(root) / name for unit in units if unit.seed == seed]
            rows.setdefault(name, []).append(_outcome(seed, folders, label_range))
    return rows


def _outcome(seed: int, folders: list[Path], label_range: tuple[float, float]) -> Outcome:
    names, predictions, truths = [], [], []
    for folder in folders:
        part = read_predictions(folder / PREDICTIONS)
        names += part[0]
        predictions.append(torch.from_numpy(part[1]))
        truths.append(torch.from_numpy(part[2]))
    predictions, truths = torch.cat(predictions), torch.cat(truths)
    results = [load_result(folder) for folder in folders]
    metrics = measure(predictions, truths, label_range)
    return Outcome(seed, names, predictions.numpy(), truths.numpy(), metrics, results)
