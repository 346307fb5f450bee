"""Files made to do harm, by the command line: status 2, one line, nothing run or left, memory and time bounded."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import find
from training_help import mmfast

from mmfast.data import load
from mmfast.errors import UserError

h5py = pytest.importorskip("h5py")
GROWTH, SECONDS = 1.5 * 2**20, 20  # kB
MIB = 2**20


def write(row: str, folder: Path) -> Path:
    """The small file or folder of a row of the layouts."""
    return Path(next(layout for layout in find() if layout.name == row).write(folder))


def in_splits(value: bytes) -> bytes:
    """Opcodes of a MulT pickle whose text is `value`."""
    split = text("text") + value + text("audio") + b"]" + text("labels") + b"]"
    return b"\x80\x04}" + text("train") + b"}(" + split + b"us."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


class Absurd:
    """An array of 512 GiB without a byte."""

    def __reduce__(self):
        array = np.zeros(0).__reduce__()
        return *array[:2], (1, (2**31, 64), np.dtype("f4"), False, b"")


def memo_bomb(path: Path) -> None:
    value = [0.0]
    for _ in range(60):
        value = [value, value]
    path.write_bytes(
        pickle.dumps({"train": {"text": value, "audio": value, "labels": value, "id": value}}, 2)
    )


def ragged_bomb(path: Path) -> None:
    sample = {"text": np.ones((1 << 18, 16), np.float32), "label": 0.0}
    path.write_bytes(pickle.dumps([[sample] * 100_000] * 3, 4))


def absurd_array(path: Path) -> None:
    path.write_bytes(pickle.dumps({"train": {"text": Absurd(), "labels": [0.0]}}, 4))


def npy(shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return out.getvalue()


def four_tebibytes(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("train/text.npy", npy((2**20, 2**10, 2**10)))
        out.writestr("train/labels.npy", npy((0,)))


def deflate_bomb(path: Path) -> None:
    """3.9 GiB of zeros in 4 MB: one piece of the packed stream many times."""
    name, header, pieces = b"train/text.npy", npy((62 * 16, MIB)), 62 * 4
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(header) + packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(bytes(16 * MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    packed = start + piece * pieces + packer.flush()
    sizes = struct.pack("<HHIIIHH", 0, 0, 0, len(packed), len(header) + pieces * 16 * MIB, len(name), 0)
    local = b"PK\x03\x04" + struct.pack("<HHH", 20, 0, 8) + sizes + name
    central = b"PK\x01\x02" + struct.pack("<HHHH", 20, 20, 0, 8) + sizes + bytes(14) + name
    labels = b"train/labels.npy"
    none = npy((0,))
    of_labels = struct.pack("<HHIIIHH", 0, 0, zlib.crc32(none), len(none), len(none), len(labels), 0)
    local += packed
    at = struct.pack("<I", len(local))
    local += b"PK\x03\x04" + struct.pack("<HHH", 20, 0, 0) + of_labels + labels + none
    central += b"PK\x01\x02" + struct.pack("<HHHH", 20, 20, 0, 0) + of_labels + bytes(10) + at + labels
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 2, 2, len(central), len(local), 0)
    path.write_bytes(local + central + end)


def twelve_terabytes(path: Path) -> None:
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple((10**9, 10, 150))
        h5py.h5d.create(file.create_group("train").id, b"text", h5py.h5t.NATIVE_DOUBLE, space)
        file["train/labels"] = np.zeros(3)


def long_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 60) + b'{"__metadata__": {"format": "mmfast-data 2"}}')


def loud(path: Path) -> None:
    """A folder with a WAV that claims 4 GiB and 0 Hz."""
    form = struct.pack("<IHHIIHH", 16, 1, 1, 0, 0, 2, 16)
    wave = (
        b"RIFF" + struct.pack("<I", 2**32 - 1) + b"WAVEfmt " + form + b"data" + struct.pack("<I", 2**32 - 1)
    )
    path.mkdir()
    (path / "a.wav").write_bytes(wave + bytes(40))


EATERS = {
    "memo.pkl": memo_bomb,
    "repeated.pkl": ragged_bomb,
    "absurd.pkl": absurd_array,
    "header.npz": four_tebibytes,
    "deflate.npz": deflate_bomb,
    "huge.h5": twelve_terabytes,
    "header.mmfast": long_header,
    "sound": loud,
}
MEASURE = """
import contextlib, io, json, os, resource, sys, time
from mmfast.cli.main import main
for path in sys.argv[2:]:
    for words in (["inspect", path], ["convert", path, sys.argv[1]]):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.redirect_stdout(io.StringIO()):
            status = main(words)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        left = os.path.exists(sys.argv[1])
        left and os.remove(sys.argv[1])
        print(json.dumps([path, status, grown, time.monotonic() - start, left, told.getvalue()]))
"""


def test_eaters_of_memory_and_time_are_refused_within_bounds(tmp_path):
    harmless = write("MulT aligned", tmp_path)
    paths = [tmp_path / name for name in EATERS]
    for path, make in zip(paths, EATERS.values(), strict=True):
        make(path)
    before = sorted(tmp_path.rglob("*"))
    words = [sys.executable, "-c", MEASURE, str(tmp_path / "made.mmfast"), str(harmless), *map(str, paths)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS * 2 * len(paths))
    assert (run.returncode, run.stderr) == (0, ""), run.stderr[-2000:]
    told = [json.loads(line) for line in run.stdout.splitlines()]
    assert [row[1:2] + row[4:] for row in told[:2]] == [[0, False, ""], [0, True, ""]]
    assert len(told) == 2 + 2 * len(paths)
    for path, status, grown, seconds, left, error in told[2:]:
        assert (status, left) == (2, False), (path, error)
        assert error.startswith("mmfast: ") and path in error and error.count("\n") == 1, error
        assert error.endswith("\n") and len(error) < 1000, error
        assert seconds < SECONDS and grown < GROWTH, (path, grown, seconds)
    assert sorted(tmp_path.rglob("*")) == before


TOUCH = text("touch marker")
SYSTEM = b"cposix\nsystem\n"


class Call:
    def __reduce__(self):
        return os.system, ("touch marker",)


def object_array() -> bytes:
    return pickle.dumps({"train": {"text": np.array([Call(), None], object), "labels": [0.0, 1.0]}}, 4)


def torch_file(new: bool) -> bytes:
    out = io.BytesIO()
    torch.save({"train": {"src-text": Call(), "tgt": []}}, out, _use_new_zipfile_serialization=new)
    return out.getvalue()


# Content, the name that is told, and whether Python's own reader runs it.
CALLS = {
    "REDUCE": (lambda: in_splits(SYSTEM + TOUCH + b"\x85R"), "posix.system", True),
    "INST": (lambda: in_splits(b"(" + TOUCH + b"iposix\nsystem\n"), "posix.system", True),
    "OBJ": (lambda: in_splits(b"(" + SYSTEM + TOUCH + b"o"), "posix.system", True),
    "dotted": (
        lambda: in_splits(text("shutil") + text("os.system") + b"\x93" + TOUCH + b"\x85R"),
        "shutil.os.system",
        True,
    ),
    "NEWOBJ": (lambda: in_splits(b"csubprocess\nPopen\n" + TOUCH + b"\x85\x81"), "subprocess.Popen", False),
    "NEWOBJ_EX": (
        lambda: in_splits(b"csubprocess\nPopen\n" + TOUCH + b"\x85}\x92"),
        "subprocess.Popen",
        False,
    ),
    "BUILD": (lambda: in_splits(b"csubprocess\nPopen\n}" + TOUCH + b"Nsb"), "subprocess.Popen", False),
    "object array": (object_array, "posix.system", True),
    "torch": (lambda: torch_file(True), "posix.system", False),
    "old torch": (lambda: torch_file(False), "posix.system", False),
}


@pytest.mark.skipif(os.name != "posix", reason="files that name posix")
@pytest.mark.parametrize("kind", CALLS)
def test_code_is_not_run_and_its_name_is_told(tmp_path, monkeypatch, capsys, kind):
    make, name, runs = CALLS[kind]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pkl"
    path.write_bytes(make())
    for words in (["inspect", path], ["convert", path, "made.mmfast"]):
        assert mmfast(*words) == 2
        assert f"mmfast: {path}: holds {name}, which is code" in one_line(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pkl"]
    if runs:
        pickle.loads(path.read_bytes())
        assert (tmp_path / "marker").exists(), "the file would do no harm to anybody"


def one_line(capsys) -> str:
    out, error = capsys.readouterr()
    assert not out and error.startswith("mmfast: ") and error.count("\n") == 1 and error.endswith("\n"), error
    return error


def refused(capsys, path: Path, *flags) -> str:
    """The line by which both commands refuse a source."""
    target = path.parent / "made.mmfast"
    lines = []
    for words in (["inspect", path], ["convert", path, target]):
        assert mmfast(*words, *flags) == 2
        lines.append(one_line(capsys))
    assert lines[0] == lines[1] and not target.exists()
    return lines[0]


def a_folder(path):
    path.mkdir()


def a_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


def a_loop(path):
    path.symlink_to(path.with_suffix(".other"))
    path.with_suffix(".other").symlink_to(path)


def unreadable(path):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    write("MulT aligned", path.parent).rename(path)
    path.chmod(0)


def a_link_to_nothing(path):
    path.symlink_to(path.parent / "nothing")


SOURCES = {
    a_folder: "is of no known kind: found a folder with nothing in it",
    os.mkfifo: "must be a regular file, got a FIFO",
    a_socket: "must be a regular file, got a socket",
    a_loop: "cannot be read (Too many levels of symbolic links)",
    unreadable: "cannot be read (Permission denied)",
    a_link_to_nothing: "does not exist",
}


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_what_is_no_file_is_refused_without_waiting(tmp_path, monkeypatch, capsys, make):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pkl"
    make(path)
    line = refused(capsys, path)
    assert str(path) in line and SOURCES[make] in line


def test_a_device_is_refused(capsys, tmp_path):
    (tmp_path / "x.pkl").symlink_to("/dev/zero")
    assert "must be a regular file, got a device" in refused(capsys, tmp_path / "x.pkl")


def test_a_source_may_be_a_link(tmp_path, capsys):
    path = write("MulT aligned", tmp_path)
    (tmp_path / "link").symlink_to(path)
    assert mmfast("inspect", tmp_path / "link") == 0


def told_of(path: Path, options) -> str:
    try:
        return load(path, **options).fingerprint()
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("row", find(), ids=lambda row: row.name)
def test_files_of_a_folder_that_lead_out_of_it_are_not_read(tmp_path, row):
    (tmp_path / "in").mkdir()
    path = Path(row.write(tmp_path / "in"))
    options = {**row.options, **row.options_from(tmp_path / "in")}
    outside = tmp_path / "outside"
    outside.mkdir()
    os.mkfifo(outside / "fifo")
    if not path.is_dir():
        pytest.skip("this layout is one file: no folder to lead out of")
    files = [p for p in sorted(path.rglob("*")) if p.is_file()]

    def refused_or_like(without: str, file: Path) -> bool:
        told = told_of(path, options)
        file.unlink()
        reasons = ("must stay inside its folder, leads to ", "must be a regular file, got a FIFO")
        return told == without or any(f"{file}: {reason}" in told for reason in reasons)

    for file in files[:: -(-len(files) // 6)]:
        shutil.move(file, outside / "kept")
        without = told_of(path, options)
        for target in (outside / "kept", outside / "fifo"):
            file.symlink_to(target)
            assert refused_or_like(without, file)
        os.mkfifo(file)
        assert refused_or_like(without, file)
        shutil.move(outside / "kept", file)


def test_a_table_leads_nowhere_else(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    path = write("sound, table of numbers", tmp_path / "in")
    shutil.copy(next(path.parent.glob("*.wav")), tmp_path / "x.wav")
    lines = path.read_text().splitlines()
    column = lines[0].split("\t").index("path")
    cells = lines[1].split("\t")
    for name in ("../x.wav", str(tmp_path / "x.wav"), "here/../../x.wav"):
        cells[column] = name
        path.write_text("\n".join([lines[0], "\t".join(cells), *lines[2:]]))
        assert "must be relative to the table and stay in its folder" in refused(capsys, path)


def test_an_hdf5_file_leads_nowhere_else(tmp_path, capsys):
    path = write("h5 SPLIT_NAME", tmp_path)
    with h5py.File(path) as file:
        key, values = next((k, v[()]) for k, v in file.items() if v.ndim == 3)
    with h5py.File(tmp_path / "outside.h5", "w") as file:
        file["d1"] = values
    values.tofile(tmp_path / "outside.bin")
    with h5py.File(path, "r+") as file:
        del file[key]
        file[key] = h5py.ExternalLink(str(tmp_path / "outside.h5"), "d1")
    assert f"{key} must lie in the file itself, got an external link" in refused(capsys, path)
    with h5py.File(path, "r+") as file:
        del file[key]
        raw = [(str(tmp_path / "outside.bin"), 0, values.nbytes)]
        file.create_dataset(key, values.shape, values.dtype, external=raw)
    assert f"{key} must lie in the file itself, got external storage" in refused(capsys, path)


@pytest.mark.parametrize("name", ["../../x", "/x"])
def test_members_of_an_archive_are_not_extracted(tmp_path, monkeypatch, capsys, name):
    here = tmp_path / "in" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    path = write("npz SPLIT/NAME", here)
    with zipfile.ZipFile(path, "a") as out:
        out.writestr(name, b"hello")
        out.writestr(f"{name}.npy", npy((0,)))
    before = sorted(tmp_path.rglob("*"))
    assert mmfast("inspect", path) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before and not Path("/x").exists()


@pytest.mark.parametrize("flag", ["--labels-from", "--embedding", "--split"])
def test_files_beside_the_source_are_not_waited_for(tmp_path, capsys, flag):
    row = {"--embedding": "MISA folder"}.get(flag, "MulT aligned")
    pipe = tmp_path / "pipe.json"
    path = write(row, tmp_path)
    os.mkfifo(pipe)
    assert f"{pipe}: must be a regular file, got a FIFO" in refused(capsys, path, f"{flag}={pipe}")
