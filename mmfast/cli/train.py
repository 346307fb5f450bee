"""The commands that train and predict: parsed arguments in, files and a few lines out."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mmfast.cli import arguments
from mmfast.cli.presets import PRESETS
from mmfast.data import Standardiser
from mmfast.errors import UserError
from mmfast.files import write_json
from mmfast.metrics import shown
from mmfast.tasks import Task, task_of
from mmfast.training import embedding, exported, runs
from mmfast.training.checkpoint import RECORD, fingerprint, read_checkpoint
from mmfast.training.config import RunConfig, differences
from mmfast.training.fitting import BEST, LAST, check_device
from mmfast.training.folder import CONFIG, claim, examine
from mmfast.training.joining import joined
from mmfast.training.methods import STAGES
from mmfast.training.predictions import predict as predictions_of
from mmfast.training.predictions import write_predictions
from mmfast.training.restored import restore
from mmfast.training.seen import Overlap
from mmfast.training.splits import check_range, load_data, make_splits
from mmfast.training.stages import PRETRAINING, Stage, pretraining_stage, supervised_stage

# Quantities beside the loss that say in a line how far pre-training came.
READ = {"train_mean_diagonal": "mean diagonal", "train_mean_cosine": "mean cosine of the two views"}


def pretrain(given: Any) -> None:
    """``mmfast pretrain``: ``last.ckpt`` in ``run.folder``."""
    config = given.settings
    folder, settings = Path(config.run.folder), asdict(config)
    with _sitting("pretrain", config.run):
        examine(folder, settings, given.resume)
        splits = make_splits(load_data(config.data), config.data, config.run.seed)
        place = claim(folder, settings, given.resume, {"data.path": splits.identity})
        stage = pretraining_stage(config)
        result = runs.run_stage(
            config, stage, splits, _announced(place, runs.few_steps(config, stage, splits))
        )
    print(_summary(stage, result, folder))


def finetune(given: Any) -> None:
    """``mmfast finetune``: ``best.ckpt``, ``result.json`` and ``predictions.csv`` in ``run.folder``."""
    standardiser, said = None, []
    if source := given["from"]:
        record = read_checkpoint(source, PRETRAINING)[RECORD]
        # The encoder comes with its shape, data and standardisation, unless they are given anew.
        defaults = {name: record["config"][name] for name in ("data", "model")}
        given = arguments.finetune(given.argv, defaults)
        standardiser = Standardiser().load_state_dict(record["standardiser"])
        said = _inherited(defaults, given)
    config = given.settings
    folder = Path(config.run.folder)
    settings = {**asdict(config), "from": source, "freeze": given.freeze}
    with _sitting("finetune", config.run):
        examine(folder, settings, given.resume)
        splits = make_splits(load_data(config.data), config.data, config.run.seed, standardiser)
        inputs = {"data.path": splits.identity, "from": source and fingerprint(source)}
        place = claim(folder, settings, given.resume, inputs)
        place = _announced(place, *said)
        stage = supervised_stage(config, given.freeze)
        result = runs.run_stage(config, stage, splits, place, source and Path(source))
    print(_summary(stage, result, folder))
    if result.get("best_epoch", -1) + 1 == config.supervised.epochs:
        print("warning: the last epoch was the best, so more of them (supervised.epochs) may be better")
    _print_test("finetune", result)


def train(given: Any) -> None:
    """``mmfast train``: a folder for each stage in ``run.folder``, and ``result.json`` of the whole."""
    config, stages = given.settings, given.stages
    folder = Path(config.run.folder)
    settings = {**asdict(config), STAGES: given.method}
    with _sitting("train", config.run):
        examine(folder, settings, given.resume)
        splits = make_splits(load_data(config.data), config.data, config.run.seed)
        inputs = {"data.path": splits.identity}
        place = claim(folder, settings, given.resume, inputs)
        place = _announced(place, *(runs.few_steps(config, stage, splits) for stage in stages))
        result = runs.run_method(config, stages, splits, place, inputs)
    for stage in stages:
        print(f"{stage.name}: {_summary(stage, result['stages'][stage.name], folder / stage.name)}")
    _print_test("train", result["stages"][stages[-1].name])


def _summary(stage: Stage, result: Mapping[str, Any], folder: Path) -> str:
    """What a stage was trained on, for how long, to what, and where its outcome lies."""
    samples, monitor = result["samples"], stage.settings.monitor
    text = (
        f"{'' if stage.labels else 'pre-'}trained on {samples['train' if stage.labels else 'inputs']} samples "
        f"for {result['epochs']} epochs ({result['steps']} steps)"
    )
    if monitor is not None:
        name = monitor
        if monitor == "valid_loss":
            name = f"validation {task_of(result['task']).loss_title}"
        best = f"best {name} {result[monitor]:.4f} in epoch {result['best_epoch'] + 1}"
        return f"{text}, {best}: {folder / BEST}"
    last = result["history"][-1]
    read = [f"{title} {last[name]:.3f}" for name, title in READ.items() if name in last]
    text += ", ".join([f": loss {last['train_loss']:.4g}", *read])
    return f"{text}; encoder in {folder / LAST}"


def _print_test(command: str, result: Mapping[str, Any]) -> None:
    for name, count in result.get("seen", {}).items():
        _warn(f"{command}: of the {result['samples'][name]} {name} samples, {Overlap(**count)}")
    if result.get("metrics") is not None:
        lines = _lines(result["metrics"], task_of(result["task"]))
        print(f"test, {result['samples']['test']} samples:\n{lines}")


def experiment(given: Any) -> None:
    """``mmfast experiment``: all runs, ``report.html``, ``report.md`` and tables in ``run.folder``."""
    config, settings = given.settings, given.experiment
    # Here, because plots and baselines need libraries that no other command does.
    from mmfast.studies.experiment import run_experiment
    from mmfast.studies.report import write_report

    with _sitting("experiment", config.run):
        outcomes = run_experiment(config, settings)
        report = write_report(config, settings, outcomes, shlex.join(["mmfast", "experiment", *given.argv]))
    says = textwrap.fill(report.verdict, 80)
    print(f"{says}\n\n{report.table}\n\nall metrics, intervals and plots: {report.path}")


def evaluate(given: argparse.Namespace) -> None:
    """``mmfast evaluate``: metrics of a checkpoint on a split."""
    module, dataset, seen, own = restore(given.checkpoint, given.data, given.split)
    dataset, task = dataset.subset(dataset.labelled()), module.task
    if len(dataset) == 0:
        raise UserError(f"evaluate: the {given.split} split holds no labelled samples")
    overlap = seen.overlap(dataset)
    if (overlap.labels or overlap.selection) and not (own and given.split in ("train", "valid")):
        raise UserError(
            f"evaluate: the {given.split} split must hold no sample that {given.checkpoint} was trained on, got "
            f"{overlap} of {len(dataset)}; --split unseen leaves them out"
        )
    check_range(dataset, task.label_range, f"the range of the labels that {given.checkpoint} was trained on")
    metrics = task.metrics(predictions_of(module, dataset), dataset.labels)
    if given.out:
        write_json(given.out, metrics)
    print(f"{given.split}, {len(dataset)} samples:\n{_lines(metrics, task)}")
    if any(overlap):
        _warn(f"evaluate: of {len(dataset)} samples, {overlap}")


def predict(given: argparse.Namespace) -> None:
    """``mmfast predict``: a CSV of name, prediction and truth."""
    module, dataset, seen, *_ = restore(given.checkpoint, given.data, given.split)
    if len(dataset) == 0:
        raise UserError(f"predict: the {given.split} split holds no samples")
    write_predictions(Path(given.out), dataset, predictions_of(module, dataset), module.task)
    print(f"{len(dataset)} predictions: {given.out}")
    if any(overlap := seen.overlap(dataset)):
        _warn(f"predict: of {len(dataset)} samples, {overlap}; --split unseen leaves them out")


def embed(given: argparse.Namespace) -> None:
    """``mmfast embed``: an .npz archive of vectors."""
    embeddings = embedding.embed(given.checkpoint, given.data, given.split)
    embeddings.save(given.out)
    print(f"{len(embeddings)} vectors of {embeddings.fused.shape[1]} numbers: {given.out}")
    if count := int(embeddings.seen.sum()):
        _warn(
            f"embed: of {len(embeddings)} samples, {count} seen in training; --split unseen leaves them out"
        )


def export(given: argparse.Namespace) -> None:
    """``mmfast export``: a safetensors file of weights."""
    print(f"{exported.export(given.checkpoint, given.out)} tensors: {given.out}")


class _StandardOutput(logging.StreamHandler):
    """Writes to what is standard output now: a progress bar takes its place to keep lines above itself."""

    @property
    def stream(self):
        return sys.stdout

    @stream.setter
    def stream(self, _) -> None:
        pass


@contextlib.contextmanager
def _sitting(command: str, run: RunConfig) -> Iterator[None]:
    """Processes, threads and log for one command, and a sentence on how to go on after Ctrl-C."""

    def again() -> str:
        settings = Path(run.folder) / CONFIG
        if not settings.exists():
            return ""
        # That of a method has its stages, and is one.
        file = [str(settings)] if command == "train" else ["--config", str(settings)]
        words = shlex.join(["mmfast", command, *file])
        return f"go on with: {words}{'' if command == 'experiment' else ' --resume'}"

    check_device(run)
    logger = logging.getLogger("mmfast")
    handler, level = _StandardOutput(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with joined(run, again):
            if run.threads is not None:
                torch.set_num_threads(run.threads)
            yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(again()) from None
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextlib.contextmanager
def _announced(place: runs.Place, *sentences: str | None) -> Iterator[Path]:
    """``place``, and then the sentences, if any: what is refused is not warned about."""
    with place as folder:
        for sentence in filter(None, sentences):
            print(f"warning: {sentence}")
        yield folder


def _inherited(theirs: Mapping[str, Any], given: Any) -> list[str]:
    """Sentences on what of a checkpoint's settings is not taken, and what of a preset gives way to them."""
    ours = {name: asdict(getattr(given.settings, name)) for name in theirs}
    said = {
        name: f"{name} is {own} here and was {before} in pre-training"
        for name, before, own in differences(theirs, ours)
    }
    preset = PRESETS[given.preset].settings if given.preset else {}
    for name, wanted, own in differences({name: preset.get(name, {}) for name in theirs}, ours):
        if wanted is not None:  # the preset names it
            said.setdefault(
                name, f"{name} is {own} as in pre-training, not {wanted} as in --preset {given.preset}"
            )
    return list(said.values())


def _warn(sentence: str) -> None:
    print(f"mmfast: warning: {sentence}", file=sys.stderr)


def _lines(metrics: Mapping[str, float], task: Task) -> str:
    width = max(map(len, metrics))
    lines = [f"  {name:<{width}}  {shown(value, 4)}" for name, value in metrics.items()]
    return "\n".join(lines if task.name == "regression" else [*lines, textwrap.fill(task.note, 80)])
