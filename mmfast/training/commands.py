"""The commands that train and predict: arguments in, files and a few lines out."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from mmfast.cli import Parser
from mmfast.data import MultimodalDataset, Standardiser, load
from mmfast.errors import UserError
from mmfast.files import write_json
from mmfast.training import runs
from mmfast.training.checkpoint import PRETRAINING, RECORD, read_checkpoint
from mmfast.training.config import ExperimentConfig, RunConfig, check_experiment
from mmfast.training.fitting import BEST, LAST
from mmfast.training.folder import CONFIG, claim
from mmfast.training.parsing import config_parser, sections
from mmfast.training.predictions import measure, write_predictions
from mmfast.training.predictions import predict as predictions_of
from mmfast.training.presets import PRESETS
from mmfast.training.splits import load_data, make_splits, select

SPLITS = ("train", "valid", "test", "unlabelled", "all")


def pretrain(argv: list[str]) -> None:
    """``mmfast pretrain``: ``last.ckpt`` in ``run.folder``."""
    parser = _training_parser("pretrain", "Self-supervised pre-training; writes last.ckpt.")
    given = _parse(parser, argv)
    config = sections(given)
    folder = Path(config.run.folder)
    with _sitting("pretrain", config.run), claim(folder, asdict(config), given.resume):
        splits = make_splits(load_data(config.data), config.data, config.run.seed)
        result = runs.pretrain(config, splits, folder)
    last = result["history"][-1]
    print(
        f"pre-trained on {result['samples']['inputs']} samples for {result['epochs']} epochs: "
        f"loss {last['train_loss']:.4g}, mean diagonal {last['train_mean_diagonal']:.3f}; encoder in {folder / LAST}"
    )


def finetune(argv: list[str]) -> None:
    """``mmfast finetune``: ``best.ckpt``, ``result.json`` and ``predictions.csv`` in ``run.folder``."""
    parser = _training_parser("finetune", "Supervised training; writes best.ckpt and tests it.")
    parser.add_argument(
        "--from", type=str | None, help="Checkpoint of a pre-training run; random weights without it."
    )
    parser.add_argument(
        "--freeze", type=bool, default=False, help="Train only the linear head (linear evaluation)."
    )
    given = _parse(parser, argv)
    standardiser = None
    if source := given["from"]:
        record = read_checkpoint(source, PRETRAINING)[RECORD]
        # The encoder comes with its shape, data and standardisation, unless they are given anew.
        parser.set_defaults({"data": record["config"]["data"], "model": record["config"]["model"]})
        given = _parse(parser, argv)
        standardiser = Standardiser().load_state_dict(record["standardiser"])
    config = sections(given)
    folder = Path(config.run.folder)
    settings = {**asdict(config), "from": source, "freeze": given.freeze}
    with _sitting("finetune", config.run), claim(folder, settings, given.resume):
        splits = make_splits(load_data(config.data), config.data, config.run.seed, standardiser)
        result = runs.finetune(config, splits, folder, source and Path(source), given.freeze)
    print(
        f"trained on {result['samples']['train']} samples for {result['epochs']} epochs, best validation MAE "
        f"{result['valid_loss']:.4f} in epoch {result['best_epoch'] + 1}: {folder / BEST}"
    )
    if result["metrics"] is not None:
        print(f"test, {result['samples']['test']} samples:\n{_lines(result['metrics'])}")


def experiment(argv: list[str]) -> None:
    """``mmfast experiment``: all runs, ``report.html``, ``report.md`` and tables in ``run.folder``."""
    parser = _training_parser(
        "experiment", "Methodologies over seeds and folds, with a report.", resume=False
    )
    parser.add_class_arguments(ExperimentConfig, "experiment")
    given = _parse(parser, argv)
    config, settings = sections(given), given.experiment
    check_experiment(settings)
    # Here, because plots and baselines need libraries that no other command does.
    from mmfast.training.experiment import run_experiment
    from mmfast.training.report import write_report

    with _sitting("experiment", config.run):
        outcomes = run_experiment(config, settings)
        report = write_report(config, settings, outcomes)
    print(f"{report.table}\nreport: {report.path}")


def evaluate(argv: list[str]) -> None:
    """``mmfast evaluate``: metrics of a checkpoint on a split."""
    parser = Parser(prog="mmfast evaluate", description="Metrics of a fine-tuned checkpoint.")
    _add_source(parser, split="test")
    parser.add_argument("--out", help="write the metrics as JSON to this file")
    given = parser.parse_args(argv)
    module, dataset = _restore(given)
    dataset = dataset.subset(~dataset.labels.isnan())
    if len(dataset) == 0:
        raise UserError(f"evaluate: the {given.split} split holds no labelled samples")
    metrics = measure(predictions_of(module, dataset), dataset.labels)
    if given.out:
        write_json(given.out, metrics)
    print(f"{given.split}, {len(dataset)} samples:\n{_lines(metrics)}")


def predict(argv: list[str]) -> None:
    """``mmfast predict``: a CSV of name, prediction and truth."""
    parser = Parser(prog="mmfast predict", description="Predictions of a fine-tuned checkpoint as CSV.")
    _add_source(parser, split="all")
    parser.add_argument("--out", default="predictions.csv", help="the file to write (default %(default)s)")
    given = parser.parse_args(argv)
    module, dataset = _restore(given)
    if len(dataset) == 0:
        raise UserError(f"predict: the {given.split} split holds no samples")
    write_predictions(Path(given.out), dataset, predictions_of(module, dataset))
    print(f"{len(dataset)} predictions: {given.out}")


def _training_parser(command: str, description: str, resume: bool = True) -> ArgumentParser:
    parser = config_parser(f"mmfast {command}", description)
    parser.add_argument("--preset", choices=list(PRESETS), help="Settings to start from.")
    if resume:
        parser.add_argument("--resume", action="store_true", help="Go on with the run in run.folder.")
    return parser


def _parse(parser: ArgumentParser, argv: list[str]) -> Any:
    """The parsed and instantiated arguments; flags come before the configuration file before the preset."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset")
    try:
        preset = early.parse_known_args(argv)[0].preset
        if preset in PRESETS:
            known = parser.get_defaults()
            parser.set_defaults({name: values for name, values in PRESETS[preset].items() if name in known})
        return parser.instantiate(parser.parse_args(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error} (see {parser.prog} --help)") from error


@contextlib.contextmanager
def _sitting(command: str, run: RunConfig) -> Iterator[None]:
    """Threads and log for one command, and a sentence on how to go on after Ctrl-C."""
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    logger = logging.getLogger("mmfast")
    handler, level = logging.StreamHandler(sys.stdout), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    except KeyboardInterrupt:
        again = f"mmfast {command} --config {Path(run.folder) / CONFIG}"
        raise KeyboardInterrupt(
            f"go on with: {again}{'' if command == 'experiment' else ' --resume'}"
        ) from None
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _add_source(parser: argparse.ArgumentParser, split: str) -> None:
    parser.add_argument("checkpoint", help="best.ckpt of a finetune run")
    parser.add_argument("--data", help="file or folder of features; the run's own data when left out")
    parser.add_argument("--split", choices=SPLITS, default=split, help="which samples (default %(default)s)")


def _restore(given: argparse.Namespace) -> tuple[torch.nn.Module, MultimodalDataset]:
    """The network, and the chosen samples standardised as those it was trained on."""
    module, config, standardiser = runs.restore(Path(given.checkpoint))
    if given.data is None:
        dataset = select(load_data(config.data), given.split, config.data)
    else:
        dataset = select(load(given.data), given.split)
    wanted = module.encoder.features
    if dataset.features != wanted:
        raise UserError(
            f"{given.checkpoint}: was trained on the features {_sizes(wanted)}, "
            f"the data have {_sizes(dataset.features)}"
        )
    return module, standardiser.transform(dataset)


def _sizes(features: Mapping[str, int]) -> str:
    return ", ".join(f"{modality} {size}" for modality, size in features.items())


def _lines(metrics: Mapping[str, float]) -> str:
    width = max(map(len, metrics))
    return "\n".join(f"  {name:<{width}}  {value:.4f}" for name, value in metrics.items())
