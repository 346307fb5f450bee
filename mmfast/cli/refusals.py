"""What is wrong with a command line of settings, in plain words: the flag, what it must be, what was given, where."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from mmfast.training.settings import Settings, accepted, describe, inside_of, must_be, parsed
from mmfast.wording import guess, no_such_flag, one_of


def wrong_arguments(parser: ArgumentParser, settings: Settings, argv: Sequence[str]) -> str | None:
    """What is wrong with a command line, the first thing of it, or None if this function sees nothing."""
    flags = parser._option_string_actions
    previous = None
    words = iter(_Words(argv))
    for word, value in words:
        if not word.startswith("-"):
            return _too_much(word, previous, settings)
        action, name = flags.get(word.removesuffix("+")), word.lstrip("-").removesuffix("+")
        inside = inside_of(dict, settings.types.get(name.rpartition(".")[0]))
        if action is None and not inside:
            return no_such_flag(word, [f for f in flags if f.startswith("--")])
        action = action or flags[f"--{name.rpartition('.')[0]}"]
        if action.nargs == 0:
            if value is not None:
                return f"{word} takes no value, got {value!r}"
            continue
        value = words.take() if value is None and action.nargs != "?" else value
        if value is None and action.nargs != "?":
            return f"{word} needs a value"
        if value is not None and (reason := _unfit(action, name, word, value, settings)):
            return reason
        previous = name
    return None


class _Words:
    """A command line flag by flag: (flag, value behind its = or None)."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._left = list(argv)

    def __iter__(self) -> Iterator[tuple[str, str | None]]:
        return self

    def __next__(self) -> tuple[str, str | None]:
        if not self._left:
            raise StopIteration
        word = self._left.pop(0)
        name, equals, value = word.partition("=")
        return (name, value if equals else None) if word.startswith("-") else (word, None)

    def take(self) -> str | None:
        """The next word, if it is a value and no flag."""
        following = self._left[0] if self._left else "-"
        negative = following[1:2].isdigit() or following[1:2] == "."
        return self._left.pop(0) if following[:1] != "-" or negative else None


def _too_much(word: str, previous: str | None, settings: Settings) -> str:
    kind = settings.types.get(previous)
    if inside_of(list, kind):
        return f"{word!r} is too much: --{previous} takes one value, {describe(kind)}"
    return f"{word!r} is too much: settings are given as --name value"


def _unfit(action: argparse.Action, name: str, flag: str, value: str, settings: Settings) -> str | None:
    if name == "config":
        return wrong_file(value, settings)
    if name in settings.sections:
        inline = parsed(value)
        if isinstance(inline, Mapping):
            reason = settings.wrong(inline, name)
            return reason and f"{flag}: {reason}"
        return wrong_file(value, settings, name)
    if name in settings.types:
        kind = settings.types[name]
        # --NAME+ adds one to a list, or several.
        kinds = [kind, *inside_of(list, kind)] if flag.endswith("+") else [kind]
        return None if any(accepted(value, kind) for kind in kinds) else must_be(flag, kinds[-1], value)
    for kind in inside_of(dict, settings.types.get(name.rpartition(".")[0])):
        return None if accepted(value, kind) else must_be(flag, kind, value)
    if action.choices is not None and value not in action.choices:
        return f"{flag} must be {one_of(action.choices)}, got {value!r}{guess(value, action.choices)}"
    return None


def wrong_file(path: str, settings: Settings, section: str = "") -> str | None:
    """What is wrong with a YAML file of settings, or of those of a section; None if nothing is."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        return f"configuration {path}: {error.strerror}"
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}: {error.problem}" if mark else ""
        return f"configuration {path}: not YAML{where}"
    reason = None if values is None else settings.wrong(values, section)
    return reason and f"configuration {path}: {reason}"
