"""Settings by name and type; in plain words what is wrong with a value: which one, what it must be, what it is."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from mmfast.wording import guess, one_of

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
        return None if accepted(value, kind) else must_be(name, kind, value)


def _fields(kind: type) -> list[tuple[str, Any]]:
    hints = get_type_hints(kind)
    return [(field.name, hints[field.name]) for field in fields(kind)]


def in_plain_words(error: Exception, settings: Settings) -> str:
    """The parser's own sentence, without its types where it names a setting."""
    if missing := re.search(r"arguments are required: ([\w.]+)", str(error)):
        return f"{missing[1]} must be given, {describe(settings.types[missing[1]])}: it has no default"
    name = re.search(r'Parser key "([^"]+)"', str(error))
    kind = settings.types.get(name[1]) if name else None
    return " ".join(str(error).split()) if kind is None else f"{name[1]} must be {describe(kind)}"


def parsed(text: str) -> Any:
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
        return " or ".join(map(describe, options)).replace("true or false or one of", "true, false or")
    if origin is list:
        (inner,) = options
        return f"a list of {_many(inner)} such as [{', '.join(_examples(inner))}]"
    return f"a mapping of names to {_many(options[1])} such as {_examples(kind)[0]}"


def _many(kind: Any) -> str:
    if kind in _PLAIN:
        return _PLAIN[kind][1]
    if get_origin(kind) is Literal:
        return f"some of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in (Union, types.UnionType):
        return f"{' or '.join(map(describe, get_args(kind)))} each"
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


def inside_of(origin: type, kind: Any) -> list[Any]:
    """The type of the values in a list or mapping type, optional or not; empty for other types."""
    return [get_args(option)[-1] for option in (kind, *get_args(kind)) if get_origin(option) is origin]


def _choices(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [str(option) for option in get_args(kind)]
    return [choice for option in get_args(kind) for choice in _choices(option)]


def accepted(value: Any, kind: Any) -> bool:
    """Whether the value fits as it is or, as text, by what it says: 3 is text where text is wanted."""
    return fits(value, kind) or (isinstance(value, str) and fits(parsed(value), kind))


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


def must_be(name: str, kind: Any, value: Any) -> str:
    hint = guess(value, _choices(kind)) if isinstance(value, str) else ""
    return f"{name} must be {describe(kind)}, got {_short(value)}{hint}"


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
