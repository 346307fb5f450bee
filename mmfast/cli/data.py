"""The commands on data, and what runs here."""

from __future__ import annotations

import argparse
import os
import shutil
import sys

from mmfast import data
from mmfast.backends import info_text
from mmfast.data.inspection.text import ASCII_BARS, BARS
from mmfast.files import to_json

# A report is no easier to read in longer lines.
WIDEST = 100


def inspect(given: argparse.Namespace) -> None:
    """``mmfast inspect``: the report, or the same as JSON."""
    found = data.inspect(given.source, verify=given.verify, **given.options)
    if given.json:
        _print(to_json(found.json()))
    else:
        width = min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)
        _print(found.text(width, BARS if _shows(BARS) else ASCII_BARS))


def convert(given: argparse.Namespace) -> None:
    """``mmfast convert``: the file, and a line about it."""
    sources = given.sources if len(given.sources) > 1 else given.sources[0]
    found = data.load(sources, **given.options)
    data.save(found, given.target, **given.writing)
    samples = found.count(lambda part: part.ids == part.ids)
    _print(
        f"{given.target}: {samples:,} samples, {_many(len(found.modalities), 'modality', 'modalities')}, "
        f"{_bytes(os.path.getsize(given.target))}, fingerprint {found.fingerprint()}"
    )


def info(given: argparse.Namespace) -> None:
    """``mmfast info``."""
    print(info_text())


def _many(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _bytes(size: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _shows(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _print(text: str) -> None:
    if not _shows(text):
        encoding = sys.stdout.encoding or "ascii"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    print(text, flush=True)
