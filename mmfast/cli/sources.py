"""What the commands on data are told, and how a source is to be read.

Nothing here needs torch, so that help and refusals come at once.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from mmfast.cli.flags import Parser
from mmfast.errors import UserError
from mmfast.split_spec import parse

# name -> (metavar, help) of what `mmfast.data.load` takes.
READING = {
    "labels": ("NAME", "which of several kinds of labels, such as emotions, T or classification"),
    "modalities": (
        "LIST",
        "modalities to keep, such as audio,text; where files do not say what is what, also audio=COVAREP,text, "
        "or how columns are divided: text:300,audio:74,visual:35",
    ),
    "align": (
        "REF",
        "modality, or words, on whose steps the others are averaged; strict refuses unaligned samples",
    ),
    "embedding": ("FILE", "word vectors in GloVe's text format, for text that comes as words"),
    "labels_from": ("FILE", "another file with the labels of the same samples in the same order"),
    "classes": ("all", "keep samples of classes that are left out by custom"),
    "rate": ("HZ", "resample sound to this rate"),
    "spectrogram": (None, "log spectrograms in place of sound"),
    "split": (
        "SPEC",
        "splits in place of those of the files: shares such as 0.7,0.1,0.2; kfold:5 or kfold:5:0; a group such as "
        "speaker or speaker:NAME to leave one out; a .json or .csv file of names",
    ),
    "group": ("NAME", "kind of group, such as speaker, that no split divides"),
    "pool": ("SOURCE", "another source, whose samples are added without labels"),
    "seed": ("N", "of random splits (default 0)"),
}
NUMBERS = ("rate", "seed")


def inspect(argv: list[str]) -> argparse.Namespace:
    """The arguments of ``mmfast inspect``, what is given for the reader as ``options``."""
    parser = Parser(
        prog="mmfast inspect",
        description="Look at data of any known layout: sizes, lengths, gaps, broken cells, labels, groups, traps.",
    )
    parser.add_argument("source", help='file or folder of features, or "synthetic"')
    parser.add_argument(
        "--json", action="store_true", help="for programs (keys: mmfast.data.Inspection.json)"
    )
    parser.add_argument("--verify", action="store_true", help="compare stored fingerprints with the values")
    return _with_options(parser, argv)


def convert(argv: list[str]) -> argparse.Namespace:
    """The arguments of ``mmfast convert``: for the reader as ``options``, for the file as ``writing``."""
    parser = Parser(
        prog="mmfast convert",
        description="Write data of any known layout to one file that is mapped into memory, or to the older .npz by "
        "that name. Several sources become one, their names and groups with the source's in front.",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="file or folder of features")
    parser.add_argument("target", metavar="TARGET", help="the file to write, such as data.mmfast")
    parser.add_argument("--force", action="store_true", help="replace TARGET where it exists")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the stored values")
    parser.add_argument("--sort", choices=("length",), help="samples of one length side by side, read faster")
    given = _with_options(parser, argv)
    given.writing = {name: value for name in ("dtype", "sort") if (value := getattr(given, name)) is not None}
    _check_target(given.target, given.force)
    return given


def _with_options(parser: Parser, argv: list[str]) -> argparse.Namespace:
    for name, (metavar, text) in READING.items():
        flag, several = f"--{name.replace('_', '-')}", name == "pool"
        if metavar is None:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            kind = int if name in NUMBERS else str
            parser.add_argument(
                flag, metavar=metavar, help=text, type=kind, action="append" if several else "store"
            )
    given = parser.parse_args(argv)
    if given.rate is not None and given.rate <= 0:
        parser.error(f"--rate must be positive, got {given.rate}")
    if given.split is not None:
        parse(given.split)
    given.options = options_of(vars(given))
    return given


def options_of(values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that say something to the reader."""
    return {name: values[name] for name in READING if values.get(name) not in (None, False)}


def _check_target(target: str, force: bool) -> None:
    folder = os.path.dirname(target) or "."
    if not target or os.path.isdir(target):
        raise UserError(
            f"convert: TARGET must be a file to write, got {f'the folder {target}' if target else 'nothing'}"
        )
    if not os.path.isdir(folder):
        raise UserError(f"convert: TARGET must be in a folder that exists, got {target}")
    if os.path.lexists(target) and not force:
        raise UserError(f"convert: {target} exists already; --force replaces it")
