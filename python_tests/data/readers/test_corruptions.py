"""Files of every layout with bytes or parts of them changed: they are read, or refused in one line; nothing else."""

from __future__ import annotations

import os
import pickle
import re
import resource
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import rotation
import spoil
import spoil_tree
from hypothesis import given
from hypothesis import strategies as st
from layouts import Layout, find

from mmfast.errors import LONGEST, UserError

GROWTH = 1.5 * 2**20  # kB
ROWS: dict[Any, list[Layout]] = {}
for row in find():
    ROWS.setdefault(row.write, []).append(row)


class Files(dict):
    """Content of files by their names, of which a failure tells the names only."""

    def __repr__(self) -> str:
        return f"{list(self)}"


class Place(NamedTuple):
    """What one writer has written: the folder, what is read in it, with which options, and its files.

    Those are bytes, and of what holds arrays by keys, also its kind and those.
    """

    folder: Path
    source: Path
    options: list[dict[str, Any]]
    files: Files
    held: Files
    out: Path
    terminal: int


def write(rows: list[Layout], folder: Path) -> tuple[Path, list[dict[str, Any]], Files]:
    source = Path(rows[0].write(folder))
    options = [{**row.options, **row.options_from(folder)} for row in rows]
    return source, options, Files((p, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file())


@pytest.fixture(scope="module")
def terminal(request) -> Iterator[int]:
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        real = os.dup(2)
    yield real
    os.close(real)


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Files:
    """The smallest file of each writer."""
    found = Files()
    for rows in ROWS.values():
        if not rows[0].needs or pytest.importorskip(rows[0].needs):
            files = write(rows, tmp_path_factory.mktemp("other"))[2]
            smallest = min(files, key=lambda path: len(files[path]))
            found[smallest] = files[smallest]
    return found


@pytest.fixture(scope="module", params=ROWS.values(), ids=lambda rows: rows[0].name)
def place(request, tmp_path_factory, terminal) -> Iterator[Place]:
    if request.param[0].needs:
        pytest.importorskip(request.param[0].needs)
    folder, out, here = (tmp_path_factory.mktemp(name) for name in ("layout", "out", "here"))
    source, options, files = write(request.param, folder)
    held = Files((path, found) for path, content in files.items() if (found := spoil_tree.parse(content)))
    made = Place(folder, source, options, files, held, out / "x.mmfast", terminal)
    before, peak = Path.cwd(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    os.chdir(here)
    yield made
    os.chdir(before)
    assert not list(here.iterdir()), "made where the process stands"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < GROWTH


@rotation.examples(200)
@given(data=st.data())
def test_spoilt_bytes_are_read_or_refused(place, others, data):
    path = data.draw(st.sampled_from(sorted(place.files)))
    options = data.draw(st.sampled_from(place.options))
    content = spoil.spoilt(data.draw, place.files[path], Files({**others, **place.files}))
    spoil.replace(path, content)
    try:
        spoil.outcome(place.folder, place.source, options, place.terminal, place.out)
    finally:
        spoil.replace(path, place.files[path])


def test_what_is_whole_is_read_and_what_is_gone_is_refused(place):
    for options in place.options:
        assert not spoil.outcome(place.folder, place.source, options, place.terminal, place.out)
    for path, content in place.files.items():
        path.unlink()
        spoil.outcome(place.folder, place.source, place.options[0], place.terminal, place.out)
        spoil.replace(path, content)


@pytest.mark.parametrize("key", ["text", "labels"])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_a_signalling_nan_is_read_without_a_warning(tmp_path, terminal, key, dtype):
    path = Path(next(row for row in find() if row.name == "MulT aligned").write(tmp_path))
    content = pickle.loads(path.read_bytes())
    array = np.array(content["train"][key], dtype)
    bits = np.array({"f4": 0x7FA00000, "f8": 0x7FF4 << 48}[dtype], f"u{array.itemsize}")
    array.reshape(-1).view(bits.dtype)[0] = bits
    content["train"][key] = array
    path.write_bytes(pickle.dumps(content))
    assert not spoil.outcome(tmp_path, path, {}, terminal)


def test_a_sentence_is_one_printable_line_of_bounded_length():
    told = str(UserError("x.h5: keys must be d1, got " + "\n\x1b[31m" * 5000 + "end"))
    assert told.isprintable() and len(told) == LONGEST
    assert (
        told.startswith("x.h5: keys must be d1, got \\n\\x1b[31m")
        and " ... " in told
        and told.endswith("end")
    )


class Raw(UserError):
    """A sentence that is shown as it was given."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


def raising(error: BaseException):
    def read(*_, **__):
        raise error

    return read


def doing(act):
    def read(*_, **__):
        act()
        raise UserError("x")

    return read


FAULTS = {
    "another error": (lambda path: raising(TypeError("planted")), TypeError, "planted"),
    "no file": (lambda path: raising(UserError("labels must be")), AssertionError, "labels must be"),
    "two lines": (lambda path: raising(Raw(f"{path}: a\nb")), AssertionError, "isprintable"),
    "a colour": (lambda path: raising(Raw(f"{path}: \x1b[31m")), AssertionError, "isprintable"),
    "a book": (lambda path: raising(Raw(f"{path}: {'a' * 9999}")), AssertionError, "aaa"),
    "a warning": (
        lambda path: doing(lambda: warnings.warn("planted", stacklevel=1)),
        AssertionError,
        "planted",
    ),
    "a file": (lambda path: doing((path.parent / "made").touch), AssertionError, "made"),
    "a word": (lambda path: doing(lambda: os.write(2, b"planted")), AssertionError, "planted"),
    "no end": (lambda path: doing(lambda: [None for _ in iter(int, 1)]), BaseException, "must end within"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_found(tmp_path, monkeypatch, terminal, kind):
    path = tmp_path / "x.pkl"
    path.touch()
    make, error, message = FAULTS[kind]
    monkeypatch.setattr(spoil, "inspect", make(path))
    monkeypatch.setattr(spoil, "SECONDS", 0.2)
    with pytest.raises(error, match=re.escape(message)):
        spoil.outcome(tmp_path, path, {}, terminal)


@rotation.examples(200)
@given(data=st.data())
def test_other_values_shapes_and_keys_are_read_or_refused(place, data):
    if not place.held:
        pytest.skip("holds no arrays by keys")
    path = data.draw(st.sampled_from(list(place.held)))
    options = data.draw(st.sampled_from(place.options))
    spoil.replace(path, spoil_tree.file_with(data.draw, *place.held[path]))
    try:
        spoil.outcome(place.folder, place.source, options, place.terminal, place.out)
    finally:
        spoil.replace(path, place.files[path])
