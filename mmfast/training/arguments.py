"""What the training commands are told: from a command line to namespaces.

Nothing here needs torch, so that help and refusals come at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser

from mmfast.errors import UserError
from mmfast.flags import Parser
from mmfast.training.config import ExperimentConfig, check_experiment
from mmfast.training.parsing import config_parser, sections
from mmfast.training.presets import PRESETS

SPLITS = ("train", "valid", "test", "unlabelled", "all")


def pretrain(argv: list[str]) -> Any:
    """The arguments of ``mmfast pretrain``."""
    return _parse(_training_parser("pretrain", "Self-supervised pre-training; writes last.ckpt."), argv)


def finetune(argv: list[str], defaults: Mapping[str, Any] | None = None) -> Any:
    """The arguments of ``mmfast finetune``.

    ``argv`` is among them, for another call with a checkpoint's ``defaults``.
    """
    parser = _training_parser("finetune", "Supervised training; writes best.ckpt and tests it.")
    parser.add_argument(
        "--from", type=str | None, help="Checkpoint of a pre-training run; random weights without it."
    )
    parser.add_argument(
        "--freeze", type=bool, default=False, help="Train only the linear head (linear evaluation)."
    )
    given = _parse(parser, argv, defaults)
    given.argv = argv
    return given


def experiment(argv: list[str]) -> Any:
    """The arguments of ``mmfast experiment``."""
    parser = _training_parser(
        "experiment", "Methodologies over seeds and folds, with a report.", resume=False
    )
    parser.add_class_arguments(ExperimentConfig, "experiment")
    given = _parse(parser, argv)
    check_experiment(given.experiment)
    return given


def evaluate(argv: list[str]) -> argparse.Namespace:
    """The arguments of ``mmfast evaluate``."""
    parser = Parser(prog="mmfast evaluate", description="Metrics of a fine-tuned checkpoint.")
    _add_source(parser, split="test")
    parser.add_argument("--out", help="write the metrics as JSON to this file")
    return parser.parse_args(argv)


def predict(argv: list[str]) -> argparse.Namespace:
    """The arguments of ``mmfast predict``."""
    parser = Parser(prog="mmfast predict", description="Predictions of a fine-tuned checkpoint as CSV.")
    _add_source(parser, split="all")
    parser.add_argument("--out", default="predictions.csv", help="the file to write (default %(default)s)")
    return parser.parse_args(argv)


def _training_parser(command: str, description: str, resume: bool = True) -> ArgumentParser:
    parser = config_parser(f"mmfast {command}", description)
    parser.add_argument("--preset", choices=list(PRESETS), help="Settings to start from.")
    if resume:
        parser.add_argument("--resume", action="store_true", help="Go on with the run in run.folder.")
    return parser


def _parse(parser: ArgumentParser, argv: list[str], defaults: Mapping[str, Any] | None = None) -> Any:
    """The arguments, with the checked configuration as ``settings``.

    Flags come before the configuration file before ``defaults`` before the preset.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset")
    try:
        preset = early.parse_known_args(argv)[0].preset
        if preset in PRESETS:
            known = parser.get_defaults()
            parser.set_defaults({name: values for name, values in PRESETS[preset].items() if name in known})
        if defaults:
            parser.set_defaults(dict(defaults))
        given = parser.instantiate(parser.parse_args(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error} (see {parser.prog} --help)") from error
    given.settings = sections(given)
    return given


def _add_source(parser: argparse.ArgumentParser, split: str) -> None:
    parser.add_argument("checkpoint", help="best.ckpt of a finetune run")
    parser.add_argument("--data", help="file or folder of features; the run's own data when left out")
    parser.add_argument("--split", choices=SPLITS, default=split, help="which samples (default %(default)s)")
