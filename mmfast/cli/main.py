"""The command ``mmfast``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mmfast.cli.flags import Parser
from mmfast.errors import UserError
from mmfast.version import __version__

# name -> (where its arguments are parsed, where its work is done, one line of help), both by functions of the
# command's name. The first needs no torch and takes the command line; the second takes what the first returns.
_TRAINING = ("mmfast.cli.arguments", "mmfast.cli.train")
_DATA = ("mmfast.cli.sources", "mmfast.cli.data")
COMMANDS = {
    "pretrain": (*_TRAINING, "train encoder and projector without labels (Barlow Twins)"),
    "finetune": (*_TRAINING, "train encoder and head with labels, from random or pre-trained weights"),
    "train": (*_TRAINING, "a method: several stages of training, one after the other, from a YAML file"),
    "evaluate": (*_TRAINING, "metrics of a fine-tuned checkpoint"),
    "predict": (*_TRAINING, "predictions of a fine-tuned checkpoint as CSV"),
    "embed": (*_TRAINING, "vectors that an encoder makes of each sample, as .npz"),
    "export": (*_TRAINING, "weights of an encoder as safetensors, to use without its run"),
    "experiment": (*_TRAINING, "compare methodologies over seeds and folds, with a report"),
    "inspect": (*_DATA, "look at a data set: sizes, lengths, gaps, broken cells, labels, traps"),
    "convert": (*_DATA, "write data of any layout to one file of mmfast's own"),
    "info": ("mmfast.cli.main", "mmfast.cli.data", "versions, and which kernels run here"),
}
# Modules of the extra requirements, by which a missing one is told from a fault.
EXTRAS = (
    "jsonargparse",
    "lightning",
    "h5py",
    "matplotlib",
    "rich",
    "safetensors",
    "sklearn",
    "scipy",
    "tensorboard",
    "yaml",
)


def main(argv: Sequence[str] | None = None, ready: Callable[[], Any] = lambda: None) -> int:
    """Run one command; returns the exit status.

    0 is success; 2 a user's error, with one sentence on standard error; 130 an interruption (Ctrl-C, SIGTERM).

    Args:
        argv: the words behind ``mmfast``, by default those of this process.
        ready: called when all is imported and the command starts its work.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(argv, ready)
    except UserError as error:
        return _fail(str(error), 2)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        return _fail(f"{argv[0]} needs {error.name}, which is not installed: pip install 'mmfast[train]'", 2)
    except BrokenPipeError:
        # The reader of a pipe has had enough, as in ``mmfast inspect PATH | head``.
        sys.stdout = None
        return 0
    except OSError as error:
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 2)
    except KeyboardInterrupt as error:
        return _fail(f"interrupted{f'; {error}' if str(error) else ''}", 130)


def _run(argv: list[str], ready: Callable[[], Any]) -> int:
    parser = Parser(
        prog="mmfast",
        description="Self-supervised multimodal learning.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "\n".join(f"  {name:<12}{text}" for name, (*_, text) in COMMANDS.items())
        + "\n\nto see all of it at work, in minutes on synthetic data: mmfast experiment --preset demo",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="see mmfast COMMAND --help"
    )
    given = parser.parse_args(argv)
    if given.version:
        print(__version__)
    elif given.command is None:
        parser.print_help()
    else:
        arguments, work, _ = COMMANDS[given.command]
        known = getattr(importlib.import_module(arguments), given.command)(given.arguments)
        run = getattr(importlib.import_module(work), given.command)
        ready()
        run(known)
    return 0


def info(argv: list[str]) -> argparse.Namespace:
    """The arguments of ``mmfast info``."""
    return Parser(prog="mmfast info", description=COMMANDS["info"][-1]).parse_args(argv)


def _fail(sentence: str, status: int) -> int:
    # Lines are joined, but spaces within one kept: they may be part of a path.
    lines = filter(None, map(str.strip, sentence.splitlines()))
    # Of processes that torchrun or Lightning started on a machine one is enough to say it.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"mmfast: {' '.join(lines)}", file=sys.stderr)
    return status
