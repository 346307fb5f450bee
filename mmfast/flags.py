"""Command-line flags, and what is wrong with them in plain words."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn

from mmfast.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a :class:`UserError` of one plain sentence, and whose flags are written out."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, allow_abbrev=False, **options)

    def parse_args(self, argv=None, namespace=None) -> argparse.Namespace:
        given, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            self.error(
                no_such_flag(word, self._option_string_actions)
                if word[:1] == "-"
                else f"{word!r} is too much"
            )
        return given

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("mmfast").strip()
        raise UserError(f"{f'{command}: ' if command else ''}{message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: str) -> None:
        if action.choices is not None and value not in action.choices:
            self.error(
                f"{_name(action)} must be {one_of(action.choices)}, got {value!r}{guess(value, action.choices)}"
            )

    def _match_argument(self, action: argparse.Action, pattern: str) -> int:
        try:
            return super()._match_argument(action, pattern)
        except argparse.ArgumentError:
            self.error(f"{_name(action)} needs a value")


def _name(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else action.dest


def no_such_flag(word: str, known: Iterable[str]) -> str:
    """The sentence about a flag that does not exist."""
    return f"there is no {word}{guess(word, known)}"


def one_of(choices: Iterable) -> str:
    return f"one of {', '.join(map(str, choices))}"


def guess(word: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` with the known words that are like it, or nothing.

    Of dotted names the last part alone will do: ``--lr`` is like ``--pretraining.lr`` and ``--supervised.lr``.
    """
    names = {str(name).lstrip("-"): str(name) for name in known if name != word}
    bare = word.lstrip("-").replace("-", "_")
    alike = [name for name in names if "." in name and name.rpartition(".")[2] == bare]
    alike = [names[name] for name in alike or get_close_matches(bare, names, n=1, cutoff=0.6)]
    return f"; did you mean {' or '.join(alike)}?" if alike else ""
