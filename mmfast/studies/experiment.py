"""Methodologies compared over seeds and folds."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmfast.data import MultimodalData
from mmfast.errors import UserError
from mmfast.studies.baselines import BASELINES
from mmfast.studies.statistics import NAMES
from mmfast.tasks import Task
from mmfast.training import bars, runs
from mmfast.training.config import Config, ExperimentConfig
from mmfast.training.folder import PREDICTIONS, claim, examine, finished, load_result, save_result
from mmfast.training.methods import Method, config_for, methods_of, stages_of
from mmfast.training.parsing import config_of
from mmfast.training.predictions import read_predictions, write_predictions
from mmfast.training.splits import Splits, fold_count, identity, load_data, make_splits, require_labels
from mmfast.training.stages import Stage
from mmfast.training.task import task_of_data

log = logging.getLogger(__name__)

# What the rows of baselines are.
TITLES = {
    "ridge": "ridge regression on time means",
    "constant": "median training label",
    "logistic": "logistic regression on time means",
    "base_rate": "share of each class or label among training samples",
}


class Run(NamedTuple):
    """One stage in a folder of a unit.

    Attributes:
        config: of the method.
        stage: what is trained.
        before, source: the stage before and its folder, None for the first.
        chain: all that its outcome depends on beside the unit.
    """

    config: Config
    stage: Stage
    before: Stage | None
    source: str | None
    chain: tuple[Any, ...]


def plan(config: Config, methods: Mapping[str, Method]) -> dict[str, Run]:
    """Folder in a unit -> what runs there: stages that several methods begin with, then each method's last one.

    Raises:
        UserError: a method that is refused, or whose last stage has no labels to be tested by.
    """
    shared: dict[str, Run] = {}
    last: dict[str, Run] = {}
    for row, method in methods.items():
        own = config_for(method, config)
        stages = stages_of(own, method.stages, method.source)
        if not stages[-1].labels:
            raise UserError(
                f"{method.source}: the last stage must have labels, by which it is tested, got none"
            )
        before, source, chain = None, None, (own,)
        for stage in stages[:-1]:
            chain += (stage.describe(),)
            folder = stage.name
            if folder in methods or folder in TITLES or (folder in shared and shared[folder].chain != chain):
                folder = f"{row}-{stage.name}"
            shared[folder] = Run(own, stage, before, source, chain)
            before, source = stage, folder
        last[row] = Run(own, stages[-1], before, source, (*chain, stages[-1].describe()))
    return shared | last


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
        names, predictions, truths: (N,), (N, columns) and (N,) or (N, K) of every test sample; with folds, each
            sample is predicted by the run that did not train on it, and all are pooled before any metric is computed.
        metrics: name -> value on them.
        results: the runs' ``result.json``, one per fold.
    """

    seed: int
    names: list[str]
    predictions: Any
    truths: Any
    metrics: dict[str, float]
    results: list[dict[str, Any]]

    @property
    def trained(self) -> bool:
        """Whether a network was trained, with a history of epochs."""
        return "history" in self.results[0]


def run_experiment(config: Config, experiment: ExperimentConfig) -> dict[str, list[Outcome]]:
    """Run what is not yet complete in ``config.run.folder``; goes on where an earlier sitting stopped.

    Each unit of (seed, fold) pre-trains once, for all methodologies that ask for it. Random weights of a seed are the
    same for all methodologies.

    Returns:
        Row of the table -> one outcome per seed. The baselines know no chance, so they have one outcome, or one per
        seed when the seed chooses the labels (``data.label_share``).

    Raises:
        UserError: as any of the runs, or a folder that holds another experiment.
    """
    root = Path(config.run.folder)
    settings = {**asdict(config), "experiment": asdict(experiment)}
    begun = examine(root, settings, resume=None)
    methods = methods_of(experiment.methods, TITLES)
    planned = plan(config, methods)
    inputs = {f"experiment.methods {m.source}": repr(m[1:3]) for m in methods.values() if m.source}
    data = load_data(config.data)
    units = units_of(config, experiment, data)
    workers = min(experiment.workers or _workers(config), len(units))
    if not begun:
        _accept(planned, units, data, workers)
    with claim(root, settings, None, {"data.path": identity(data), **inputs}):
        began = time.monotonic()
        with bars.bar(config.run.progress) as tell:
            board = tell and _board(root, planned, units, data, tell)
            _run_all(config, experiment, methods, units, workers, board)
        log.info("all runs complete after %.0f s", time.monotonic() - began)
    return collect(config, experiment, units, task_of_data(config.task, data))


def units_of(config: Config, experiment: ExperimentConfig, data: MultimodalData) -> list[Unit]:
    """All units of an experiment, seed by seed."""
    count = fold_count(data, config.data)
    folds = [None] if count is None else range(count)
    return [Unit(seed, fold) for seed in experiment.seeds for fold in folds]


def _accept(planned: Mapping[str, Run], units: list[Unit], data: MultimodalData, workers: int) -> None:
    """Refuse what any of the runs would, before the first of them starts."""
    sentences = {}
    # Folds differ in their samples; seeds only choose among them.
    for unit in (unit for unit in units if unit.seed == units[0].seed):
        splits = None
        for run in planned.values():
            own = unit.config(run.config)
            if splits is None:
                splits = make_splits(data, own.data, unit.seed)
                require_labels({"train": splits.train, "valid": splits.valid, "test": splits.test})
            module = runs.prepare(own, run.stage, splits, processes=workers).module
            sentences[runs.few_steps(own, run.stage, splits)] = None
            if run.stage.labels:
                for name, count in runs.tested_on_seen(module, splits).items():
                    sentences[f"{unit}: of the {len(getattr(splits, name))} {name} samples, {count}"] = None
    for sentence in filter(None, sentences):
        log.info("warning: %s", sentence)


def _board(
    root: Path, planned: Mapping[str, Run], units: list[Unit], data: MultimodalData, tell: bars.Listener
) -> bars.Board:
    """All networks' runs, with the numbers of samples that pass through an encoder as costs."""
    first = units[0].config(next(iter(planned.values())).config)
    splits = make_splits(data, first.data, first.run.seed)
    samples = {True: len(splits.train) + len(splits.valid), False: len(splits.inputs)}
    costs = {name: run.stage.cost * samples[run.stage.labels] for name, run in planned.items()}
    board = bars.Board({f"{unit}, {name}": cost for unit in units for name, cost in costs.items()}, tell)
    for unit in units:
        for name in costs:
            if load_result(unit.folder(root) / name) is not None:
                board.complete(f"{unit}, {name}")
    return board


def _run_all(
    config: Config,
    experiment: ExperimentConfig,
    methods: Mapping[str, Method],
    units: list[Unit],
    workers: int,
    board: bars.Board | None,
) -> None:
    arguments = (asdict(config), asdict(experiment), dict(methods))
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
    config: dict[str, Any],
    experiment: dict[str, Any],
    methods: dict[str, Method],
    unit: Unit,
    board: bars.Board | None = None,
) -> None:
    """All of a unit's runs that are not complete yet, perhaps in a process of their own."""
    if _queue is not None:
        board = _send
    config, experiment = unit.config(config_of(config)), ExperimentConfig(**experiment)
    root = Path(config.run.folder)
    torch.set_num_threads(config.run.threads)
    splits = make_splits(load_data(config.data), config.data, unit.seed)
    for name, run in plan(config, methods).items():
        with _heard(board, unit, name):
            result = _run(run, unit.folder(root), name, splits)
        if name in methods:
            _log(unit, name, result)
        else:
            log.info("%s, %s: %d steps (%.0f s)", unit, name, result["steps"], result["seconds"])
    if _has_baselines(config, experiment, unit.seed):
        task = task_of_data(config.task, splits)
        for name in BASELINES[task.name]:
            _log(unit, name, _baseline(name, unit.folder(root) / name, splits, task))


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
    metrics = result["metrics"]
    first = next(name for name in ("mae", "ua", "jaccard") if name in metrics)
    log.info("%s, %s: %s %.3f (%.0f s)", unit, name, NAMES[first], metrics[first], result["seconds"])


def _run(run: Run, parent: Path, name: str, splits: Splits) -> dict[str, Any]:
    folder = parent / name
    config = replace(run.config, run=replace(run.config.run, folder=str(folder)))
    source = run.source and parent / run.source / runs.outcome(run.before)
    # Relative, so that a moved experiment is still the same.
    settings = {
        **asdict(config),
        "stage": run.stage.describe(),
        "from": source and os.path.relpath(source, folder),
    }
    inputs = {"data.path": splits.identity}
    if (done := finished(folder, settings, inputs)) is not None:
        return done
    return runs.run_stage(config, run.stage, splits, claim(folder, settings, None, inputs), source)


def _baseline(name: str, folder: Path, splits: Splits, task: Task) -> dict[str, Any]:
    if (done := load_result(folder)) is not None:
        return done
    began = time.monotonic()
    predictions = torch.from_numpy(BASELINES[task.name][name](splits)).float()
    write_predictions(folder / PREDICTIONS, splits.test, predictions, task)
    metrics = task.metrics(predictions, splits.test.labels)
    result = {"kind": name, "seconds": round(time.monotonic() - began, 2), "metrics": metrics}
    save_result(folder, result)
    return result


def _has_baselines(config: Config, experiment: ExperimentConfig, seed: int) -> bool:
    return experiment.baselines and (config.data.label_share < 1 or seed == experiment.seeds[0])


def collect(
    config: Config, experiment: ExperimentConfig, units: list[Unit], task: Task
) -> dict[str, list[Outcome]]:
    """Outcomes of a complete experiment from its files, as :func:`run_experiment` returns them."""
    root = Path(config.run.folder)
    rows: dict[str, list[Outcome]] = {}
    for seed in experiment.seeds:
        baselines = list(BASELINES[task.name]) if _has_baselines(config, experiment, seed) else []
        for name in [*methods_of(experiment.methods), *baselines]:
            folders = [unit.folder(root) / name for unit in units if unit.seed == seed]
            rows.setdefault(name, []).append(_outcome(seed, folders, task))
    return rows


def _outcome(seed: int, folders: list[Path], task: Task) -> Outcome:
    names, predictions, truths = [], [], []
    for folder in folders:
        part = read_predictions(folder / PREDICTIONS, task)
        names += part[0]
        predictions.append(torch.from_numpy(part[1]))
        truths.append(torch.from_numpy(part[2]))
    predictions, truths = torch.cat(predictions), torch.cat(truths)
    results = [load_result(folder) for folder in folders]
    metrics = task.metrics(predictions, truths)
    return Outcome(seed, names, predictions.numpy(), truths.numpy(), metrics, results)
