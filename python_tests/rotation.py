"""Cases that only multiply others take turns: each run has a quarter of those that are marked ``rotation``.

``MMFAST_ROTATION`` says which: a number (its remainder by four; 0 if it is not set), or ``all``. What a number
chooses depends on the names of the cases alone, so a run can be repeated anywhere.
"""

import os
import zlib

import pytest
from hypothesis import seed, settings

SLICES = 4


def chosen() -> int | None:
    """The slice of this run; None: all of them."""
    value = os.environ.get("MMFAST_ROTATION") or "0"
    if value == "all":
        return None
    if not value.isdecimal():
        raise pytest.UsageError(f"MMFAST_ROTATION must be a whole number or all, got {value!r}")
    return int(value) % SLICES


def slice_of(item: pytest.Item) -> int | None:
    """When a case has its turn; None: always. ``rotation(n)`` says it, ``rotation`` leaves it to the name."""
    marker = item.get_closest_marker("rotation")
    if marker is None:
        return None
    return marker.args[0] if marker.args else zlib.crc32(f"{item.path.name}::{item.name}".encode()) % SLICES


def mine(number: int | None) -> bool:
    """Whether slice ``number`` is part of this run; None, no slice, always is."""
    return number is None or chosen() in (None, number)


def examples(count: int):
    """Decorates a test by hypothesis: ``count`` examples, or this run's share of them, others in each slice."""
    number = chosen()
    if number is None:
        return settings(max_examples=count)
    share = settings(max_examples=count // SLICES, derandomize=False, database=None)
    return lambda test: seed(number)(share(test))
