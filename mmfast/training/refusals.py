"""What is wrong with settings, in plain words: which one, what it must be, what was given, where."""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from mmfast.wording import guess, no_such_flag, one_of

# Type -> (what a value is, what several are, two of them).
_PLAIN = {
    int: ("a whole number", "whole numbers", ("1", "2")),
    float: ("a number", "numbers", ("0.1", "0.2")),
    bool: ("true or false", "true and false", ("true", "false")),
    str: ("text", "texts", ("a", "b")),
    Any: ("a value", "values", ("value", "value")),
}


class Settings:
    """What a command can be told: dotted name -> type, and the names of sections (nested dataclasses).

    Args:
        kind: the dataclass whose fields are at the top.
    """

    def __init__(self, kind: type) -> None:
        self.types: dict[str, Any] = {}
        self.sections: list[str] = []
        for name, inner in _fields(kind):
            self.add(name, inner)

    def add(self, name: str, kind: Any) -> None:
        """A setting of a type, or a section of a dataclass."""
        if not is_dataclass(kind):
            self.types[name] = kind
            return
        self.sections.append(name)
        for key, inner in _fields(kind):
            self.add(f"{name}.{key}", inner)

    @property
    def names(self) -> list[str]:
        return [*self.types, *self.sections]

    @property
    def top(self) -> list[str]:
        return [name for name in self.names if "." not in name]

    def wrong(self, values: Any, prefix: str = "") -> str | None:
        """What is wrong with nested ``values``, such as a YAML file holds, or None."""
        if not isinstance(values, Mapping):
            return (
                f"{prefix or 'it'} must hold settings, one a line such as 'name: value', got {_short(values)}"
            )
        for key, value in values.items():
            name = f"{prefix}.{key}".lstrip(".")
            if key == "__path__":  # where the parser says that a section came out of a file
                continue
            if name in self.sections:
                reason = self.wrong(value, name)
            elif name not in self.types:
                reason = f"there is no setting {name}{guess(name, self.names)}"
            else:
                reason = self.unfit(name, value)
            if reason:
                return reason
        return None

    def unfit(self, name: str, value: Any) -> str | None:
        """That the value of the setting ``name`` is of the wrong type, or None."""
        kind = self.types[name]
        return None if _accepted(value, kind) else _must_be(name, kind, value)


def _fields(kind: type) -> list[tuple[str, Any]]:
    hints = get_type_hints(kind)
    return [(field.name, hints[field.name]) for field in fields(kind)]


def wrong_arguments(parser: ArgumentParser, settings: Settings, argv: Sequence[str]) -> str | None:
    """What is wrong with a command line, the first thing of it, or None if this function sees nothing."""
    flags = parser._option_string_actions
    previous = None
    words = iter(_Words(argv))
    for word, value in words:
        if not word.startswith("-"):
            return _too_much(word, previous, settings)
        action, name = flags.get(word.removesuffix("+")), word.lstrip("-").removesuffix("+")
        inside = _inside(dict, settings.types.get(name.rpartition(".")[0]))
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


def in_plain_words(error: Exception, settings: Settings) -> str:
    """The parser's own sentence, without its types where it names a setting."""
    if missing := re.search(r"arguments are required: ([\w.]+)", str(error)):
        return f"{missing[1]} must be given, {describe(settings.types[missing[1]])}: it has no default"
    name = re.search(r'Parser key "([^"]+)"', str(error))
    kind = settings.types.get(name[1]) if name else None
    return " ".join(str(error).split()) if kind is None else f"{name[1]} must be {describe(kind)}"


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
    if _inside(list, kind):
        return f"{word!r} is too much: --{previous} takes one value, {describe(kind)}"
    return f"{word!r} is too much: settings are given as --name value"


def _unfit(action: argparse.Action, name: str, flag: str, value: str, settings: Settings) -> str | None:
    if name == "config":
        return wrong_file(value, settings)
    if name in settings.sections:
        inline = _parsed(value)
        if isinstance(inline, Mapping):
            reason = settings.wrong(inline, name)
            return reason and f"{flag}: {reason}"
        return wrong_file(value, settings, name)
    if name in settings.types:
        kind = settings.types[name]
        # --NAME+ adds one to a list, or several.
        kinds = [kind, *_inside(list, kind)] if flag.endswith("+") else [kind]
        return None if any(_accepted(value, kind) for kind in kinds) else _must_be(flag, kinds[-1], value)
    for kind in _inside(dict, settings.types.get(name.rpartition(".")[0])):
        return None if _accepted(value, kind) else _must_be(flag, kind, value)
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


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def describe(kind: Any) -> str:
    """What a value of the type is, in plain words."""
    options = get_args(kind)
    origin = get_origin(kind)
    if kind in _PLAIN:
        return _PLAIN[kind][0]
    if origin is Literal:
        return one_of(options)
    if origin in (Union, types.UnionType):
        if type(None) in options:
            rest = [option for option in options if option is not type(None)]
            return f"{' or '.join(map(describe, rest))}, or null"
        return ", ".join(map(describe, options)).replace("true or false, one of", "true, false or")
    if origin is list:
        (inner,) = options
        return f"a list of {_many(inner)} such as [{', '.join(_examples(inner))}]"
    return f"a mapping of names to {_many(options[1])} such as {_examples(kind)[0]}"


def _many(kind: Any) -> str:
    if kind in _PLAIN:
        return _PLAIN[kind][1]
    if get_origin(kind) is Literal:
        return f"some of {', '.join(map(str, get_args(kind)))}"
    return "lists" if get_origin(kind) is list else "mappings"


def _examples(kind: Any) -> Sequence[str]:
    if kind in _PLAIN:
        return _PLAIN[kind][2]
    if get_origin(kind) is Literal:
        return [str(option) for option in get_args(kind)[:2]]
    if get_origin(kind) is list:
        return [f"[{', '.join(_examples(get_args(kind)[0]))}]"]
    if get_origin(kind) in (Union, types.UnionType):
        return _examples(get_args(kind)[0])
    return [f"{{name: {_examples(get_args(kind)[1])[0]}}}"]


def _inside(origin: type, kind: Any) -> list[Any]:
    """The type of the values in a list or mapping type, optional or not; empty for other types."""
    return [get_args(option)[-1] for option in (kind, *get_args(kind)) if get_origin(option) is origin]


def _choices(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [str(option) for option in get_args(kind)]
    return [choice for option in get_args(kind) for choice in _choices(option)]


def _accepted(value: Any, kind: Any) -> bool:
    """Whether the value fits as it is or, as text, by what it says: 3 is text where text is wanted."""
    return fits(value, kind) or (isinstance(value, str) and fits(_parsed(value), kind))


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the type of a setting."""
    origin, options = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if kind is float:
        return _number(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is Literal:
        return value in options
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is list:
        return isinstance(value, list) and all(fits(item, options[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            fits(key, options[0]) and fits(item, options[1]) for key, item in value.items()
        )
    return isinstance(value, kind)


def _number(value: Any) -> bool:
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _must_be(name: str, kind: Any, value: Any) -> str:
    hint = guess(value, _choices(kind)) if isinstance(value, str) else ""
    return f"{name} must be {describe(kind)}, got {_short(value)}{hint}"


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
