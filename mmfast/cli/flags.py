"""Command-line flags, and what is wrong with them in plain words."""

from __future__ import annotations

import argparse
from typing import NoReturn

from mmfast.errors import UserError
from mmfast.wording import guess, no_such_flag, one_of


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
