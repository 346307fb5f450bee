"""The command ``mmfast``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from mmfast.errors import UserError

# name -> (where its function is, one line of help). Modules are imported only when their command is run.
COMMANDS = {
    "pretrain": ("mmfast.training.commands", "train encoder and projector without labels (Barlow Twins)"),
    "finetune": (
        "mmfast.training.commands",
        "train encoder and head with labels, from random or pre-trained weights",
    ),
    "evaluate": ("mmfast.training.commands", "metrics of a fine-tuned checkpoint"),
    "predict": ("mmfast.training.commands", "predictions of a fine-tuned checkpoint as CSV"),
    "experiment": ("mmfast.training.commands", "compare methodologies over seeds and folds, with a report"),
    "inspect": ("mmfast.cli", "look at a data set: sizes, lengths, gaps, broken cells, labels"),
    "info": ("mmfast.cli", "versions, and which kernels run here"),
}
# Modules of the extra requirements, by which a missing one is told from a fault.
EXTRAS = (
    "jsonargparse",
    "lightning",
    "h5py",
    "matplotlib",
    "rich",
    "sklearn",
    "scipy",
    "tensorboard",
    "yaml",
)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a :class:`UserError` instead of usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0 is success; 2 a user's error, with one sentence on standard error; 130 an interruption (Ctrl-C, SIGTERM).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(argv)
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


def _run(argv: list[str]) -> int:
    parser = Parser(
        prog="mmfast",
        description="Self-supervised multimodal learning.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items()),
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="see mmfast COMMAND --help"
    )
    given = parser.parse_args(argv)
    if given.version:
        from mmfast import __version__

        print(__version__)
    elif given.command is None:
        parser.print_help()
    else:
        module = importlib.import_module(COMMANDS[given.command][0])
        getattr(module, given.command)(given.arguments)
    return 0


def _fail(sentence: str, status: int) -> int:
    print(f"mmfast: {' '.join(sentence.split())}", file=sys.stderr)
    return status


def inspect(argv: list[str]) -> None:
    """``mmfast inspect PATH``."""
    parser = Parser(prog="mmfast inspect", description=COMMANDS["inspect"][1])
    parser.add_argument("path", help='file or folder of features, or "synthetic"')
    path = parser.parse_args(argv).path
    from mmfast.data import inspect

    print(inspect(path))


def info(argv: list[str]) -> None:
    """``mmfast info``."""
    Parser(prog="mmfast info", description=COMMANDS["info"][1]).parse_args(argv)
    from mmfast.backends import info_text

    print(info_text())


if __name__ == "__main__":
    sys.exit(main())
