"""The commands that only look."""

from __future__ import annotations

import argparse

from mmfast import data
from mmfast.backends import info_text


def inspect(given: argparse.Namespace) -> None:
    """``mmfast inspect PATH``."""
    print(data.inspect(given.path))


def info(given: argparse.Namespace) -> None:
    """``mmfast info``."""
    print(info_text())
