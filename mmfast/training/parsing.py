"""Configurations from flags and YAML files, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from mmfast.errors import UserError
from mmfast.files import write_atomically
from mmfast.training.config import Config, check
from mmfast.training.model_section import config_type, encoder_name
from mmfast.training.settings import Settings, in_plain_words


def config_parser(prog: str, description: str = "", kind: type[Config] = Config) -> ArgumentParser:
    """A parser whose flags and YAML keys are the fields of ``kind``."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of any of the settings below.")
    parser.add_class_arguments(kind, None)
    return parser


def config_of(values: Mapping[str, Any]) -> Config:
    """The configuration in a mapping, such as the one that a checkpoint holds; missing keys take their defaults.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range, or an encoder that cannot be imported.
    """
    kind = config_type(encoder_name(values))
    parser = config_parser("config", kind=kind)
    try:
        namespace = parser.parse_object(dict(values))
    except Exception as error:
        reason = Settings(kind).wrong(values) or in_plain_words(error, Settings(kind))
        raise UserError(f"config: {reason}") from error
    return sections(parser.instantiate(namespace), kind)


def sections(namespace: Any, kind: type[Config] = Config) -> Config:
    """The checked configuration among a parser's instantiated values."""
    config = kind(**{name: getattr(namespace, name) for name in kind.__dataclass_fields__})
    check(config)
    return config


def save_yaml(path: str | os.PathLike, values: Any) -> None:
    """Write a configuration or a mapping as YAML, keys in their order."""
    values = asdict(values) if is_dataclass(values) else values
    write_atomically(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def load_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """What :func:`save_yaml` wrote."""
    return yaml.safe_load(Path(path).read_text())
