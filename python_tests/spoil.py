"""Files made worse, and what must hold of whoever reads them: they are read, or refused in one line."""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from mmfast.data import inspect, load, save
from mmfast.errors import LONGEST, UserError
from mmfast.files import to_json

SECONDS = 20
# Bytes that mean something to one reader or another.
WORDS = (
    b"\xff" * 8,
    b"\0" * 8,
    b"\xff" * 7 + b"\x7f",
    b"-1",
    b"nan",
    b"1e999",
    b"\n",
    b"\r,",
    b"\x1b[31m",
    b"../",
)
NEAR = 400


def _place(draw: Callable, size: int) -> int:
    """An offset: headers stand in front, directories of archives at the end."""
    near = min(NEAR, size)
    low, high = draw(st.sampled_from([(0, near), (size - near, size), (0, size)]))
    return draw(st.integers(low, high))


def _span(draw: Callable, size: int) -> slice:
    start = _place(draw, size)
    return slice(start, min(size, start + draw(st.integers(1, 64))))


def _cut(draw, raw):
    del raw[_place(draw, len(raw)) :]


def _flip(draw, raw):
    for _ in range(draw(st.integers(1, 4))):
        raw[min(_place(draw, len(raw)), len(raw) - 1)] ^= draw(st.integers(1, 255))


def _overwrite(draw, raw):
    new = draw(st.sampled_from(WORDS) | st.binary(min_size=1, max_size=16))
    start = _place(draw, len(raw))
    raw[start : start + len(new)] = new


def _insert(draw, raw):
    start = _place(draw, len(raw))
    raw[start:start] = draw(st.sampled_from(WORDS) | st.binary(min_size=1, max_size=16))


def _delete(draw, raw):
    del raw[_span(draw, len(raw))]


def _duplicate(draw, raw):
    span = _span(draw, len(raw))
    raw[span] = raw[span] * 2


def _swap(draw, raw):
    a, b = _span(draw, len(raw)), _span(draw, len(raw))
    if a.stop > b.start:
        a, b = b, a
    if a.stop <= b.start:
        raw[:] = raw[: a.start] + raw[b] + raw[a.stop : b.start] + raw[a] + raw[b.stop :]


def _append(draw, raw):
    raw += draw(st.binary(min_size=1, max_size=100))


STEPS = (_cut, _flip, _overwrite, _insert, _delete, _duplicate, _swap, _append)


def spoilt(draw: Callable, raw: bytes, others: Mapping[Path, bytes]) -> bytes:
    """Other bytes in place of `raw`: nothing, one of `others`, or itself with up to three changes."""
    kind = draw(st.sampled_from(["steps"] * 12 + ["others", "empty"]))
    if kind != "steps":
        return others[draw(st.sampled_from(list(others)))] if kind == "others" else b""
    changed = bytearray(raw)
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=3)):
        if changed:
            step(draw, changed)
    return bytes(changed)


def replace(path: Path, content: bytes) -> None:
    """Another file by the same name: what maps the one before keeps it."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """What stands in a folder: relative name -> size and time of the last change."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def no_longer_than(seconds: float, terminal: int) -> Iterator[None]:
    """Fails what takes longer; ends the process, with its stack on `terminal`, where even that is not heard."""

    def late(*_):
        pytest.fail(f"must end within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + 40, exit=True, file=terminal)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def nothing_on_stderr() -> Iterator[None]:
    """Fails if anything, libraries in C included, writes there."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        told = file.read()
    assert not told, told


def outcome(
    folder: Path, path: Path, options: dict[str, Any], terminal: int, target: Path | None = None
) -> str:
    """Look at what stands at `path` below `folder`, convert it to `target`, and hold it to the rules.

    Returns the sentence by which it is refused, or "" where it is read.
    """
    before = listing(folder)
    sentence = ""
    with (
        no_longer_than(SECONDS, terminal),
        nothing_on_stderr(),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        try:
            found = inspect(path, **options)
            assert str(found) and to_json(found.json())
        except UserError as error:
            sentence = str(error)
        if target and not sentence:
            target.unlink(missing_ok=True)
            try:
                save(load(path, **options), target)
            except UserError as error:
                sentence = str(error)
                assert not target.exists()
            else:
                assert load(target).fingerprint() == found.fingerprint
    assert not warned, [str(w.message) for w in warned]
    after = listing(folder)
    assert after == before, sorted(before.items() ^ after.items())
    if sentence:
        assert sentence.isprintable(), f"isprintable: {sentence!a}"
        assert len(sentence) <= LONGEST, sentence
        assert str(folder) in sentence or (target and str(target) in sentence), sentence
    return sentence
