"""Small files of every layout that is read, written by the layouts' own rules and not by the package.

A module here holds ``LAYOUTS``, rows that the tests of all layouts share.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ExpectedSample:
    """One sample as it must be read.

    Attributes:
        values: modality (our name) -> (n, F) numbers; (0, F) where it is missing.
        label: number, index of the class, or K numbers; NaN for none.
        groups: kind -> name.
    """

    name: str
    values: Mapping[str, np.ndarray]
    label: Any = float("nan")
    groups: Mapping[str, str] = field(default_factory=dict)
    words: Sequence[str] | None = None
    transcript: str | None = None
    tokens: Sequence[int] | None = None


@dataclass(frozen=True)
class Expected:
    """All that must be read."""

    splits: Mapping[str, Sequence[ExpectedSample]]
    task: str
    targets: Sequence[str]
    label_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Layout:
    """One row: a layout, or a variant of it that differs in structure.

    Attributes:
        name: unique.
        write: makes a small file or folder below a folder, and returns its path.
        expected: what must be read from it.
        options: with which it is read.
        needs: module that writing or reading it needs beside numpy, such as h5py.
        options_from: options that name other files, made by what is called with the same folder after ``write``.
    """

    name: str
    write: Callable[[Path], Path]
    expected: Callable[[], Expected]
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: str | None = None
    options_from: Callable[[Path], Mapping[str, Any]] = lambda folder: {}


def find() -> list[Layout]:
    """The rows of all modules here."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return [layout for module in modules for layout in module.LAYOUTS]
