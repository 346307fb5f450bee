"""Archives of arrays that were made to do harm, and honest ones that look as if."""

import io
import re
import struct
import zipfile

import numpy as np
import pytest

from mmfast.data.readers import archive
from mmfast.data.readers.archive import describe_archive, read_archive
from mmfast.errors import UserError


def npy(array, **options) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def header(shape, dtype="<f4", version=b"\x01\x00"):
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text


def write(path, members, packing=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", packing) as out:
        for name, content in members:
            out.writestr(name, content)


def patched(path, change):
    """The archive with the bytes of its directory's first entry changed: `change(entry, file)`."""
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02")
    change(raw, at)
    path.write_bytes(raw)


ONE = [("x.npy", npy(np.arange(6.0)))]


def objects(path):
    write(path, [("x.npy", npy(np.array([{}, 1], object), allow_pickle=True))])


def a_record(path):
    write(path, [("x.npy", npy(np.zeros(3, [("a", "f4")])))])


def four_tebibytes(path):
    write(path, [("x.npy", header((2**40,)))])


def negative(path):
    write(path, [("x.npy", header((-1, 4)) + bytes(16))])


def overflowing(path):
    write(path, [("x.npy", header((2**40, 2**40, 0)) + bytes(16))])


def code_in_the_header(path):
    write(path, [("x.npy", header("__import__('os').system('touch ran')"))])


def deep_header(path):
    write(path, [("x.npy", header("(" * 9000 + ")" * 9000))])


def another_version(path):
    write(path, [("x.npy", header((4,), version=b"\x09\x00") + bytes(16))])


def no_array(path):
    write(path, [("x.npy", b"hello")])


def twice(path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        write(path, ONE * 2)


def bomb(path):
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out,
        out.open("x.npy", "w", force_zip64=True) as file,
    ):
        file.write(header((3 * 2**26,)))
        for _ in range(3 * 2**4):
            file.write(bytes(2**24))


def bomb_in_pieces(path):
    piece = npy(np.zeros(2**22, "f4"))
    write(path, [(f"{i}.npy", piece) for i in range(40)])


def larger_than_said(path):
    write(path, [("x.npy", header((4,)) + bytes(2**20))])
    patched(
        path,
        lambda raw, at: raw.__setitem__(slice(at + 24, at + 28), struct.pack("<I", len(header((4,))) + 16)),
    )


def smaller_than_said(path):
    write(path, [("x.npy", header((2**12,)) + np.random.default_rng(0).bytes(2**10))])
    size = struct.pack("<I", len(header((2**12,))) + 2**14)
    patched(path, lambda raw, at: raw.__setitem__(slice(at + 24, at + 28), size))


def more_than_can_be(path):
    write(path, ONE, zipfile.ZIP_DEFLATED)
    patched(path, lambda raw, at: raw.__setitem__(slice(at + 24, at + 28), struct.pack("<I", 2**28)))


def another_sum(path):
    write(path, ONE, zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    raw[raw.index(np.arange(6.0).tobytes()) + 3] ^= 1
    path.write_bytes(raw)


def truncated(path):
    write(path, [("x.npy", npy(np.random.default_rng(0).normal(size=10_000)))])
    path.write_bytes(path.read_bytes()[:2000])


def encrypted(path):
    write(path, ONE)
    patched(path, lambda raw, at: raw.__setitem__(at + 8, raw[at + 8] | 1))


def bzip2(path):
    write(path, ONE, zipfile.ZIP_BZIP2)


def empty(path):
    path.write_bytes(b"")


HOSTILE = [
    (objects, "x must hold numbers or text, got objects, which would be a pickle"),
    (a_record, "x must hold numbers or text, got dtype"),
    (four_tebibytes, "x must have the bytes of its shape (1099511627776,) and dtype float32, got 0"),
    (negative, "x must have the bytes of its shape (-1, 4)"),
    (overflowing, "x must have the bytes of its shape"),
    (code_in_the_header, "not a readable .npz archive"),
    (deep_header, "not a readable .npz archive"),
    (another_version, "x must be an array of numbers or text, got version (9, 0)"),
    (no_array, "not a readable .npz archive"),
    (twice, "keys must be there once, got x twice"),
    (bomb, "x must hold at most 512.0 MiB"),
    (bomb_in_pieces, "must hold at most 512.0 MiB with all arrays before it"),
    (larger_than_said, "not a readable .npz archive"),
    (smaller_than_said, "not a readable .npz archive"),
    (more_than_can_be, "x must be as large as its packed bytes can be, got 256.0 MiB in"),
    (another_sum, "not a readable .npz archive of plain arrays (Bad CRC-32"),
    (truncated, "not a readable .npz archive"),
    (encrypted, "x must be stored or deflated"),
    (bzip2, "x must be stored or deflated"),
    (empty, "not a readable .npz archive"),
]


@pytest.mark.parametrize(("make", "message"), HOSTILE, ids=[m.__name__ for m, _ in HOSTILE])
def test_a_hostile_archive_gives_one_sentence(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.npz"
    make(path)
    with pytest.raises(UserError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)) as caught:
        read_archive(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_names_that_lead_elsewhere_are_only_keys(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "x.npz", [("../../x.npy", npy(np.ones(2))), ("/etc/y.npy", npy(np.ones(3)))])
    assert sorted(read_archive(tmp_path / "in" / "x.npz")) == ["../../x", "/etc/y"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "x.npz"]


def test_every_honest_array_is_read_as_numpy_reads_it(tmp_path):
    rng = np.random.default_rng(0)
    want = {
        "plain": rng.normal(size=(3, 4)),
        "fortran": np.asfortranarray(rng.normal(size=(3, 4)).astype("f4")),
        "big": rng.integers(0, 9, 5).astype(">i4"),
        "text": np.array(["Zoë", "b"]),
        "bytes": np.array([b"a", b"bcd"]),
        "scalar": np.array(3),
        "none": np.zeros((0, 4), "f4"),
        "empty": np.array([], "U1"),
        "truth": np.array([True, False]),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **want)
        found = read_archive(tmp_path / "x.npz")
        assert list(found) == list(want)
        for key, array in want.items():
            assert found[key].dtype == array.dtype and np.array_equal(found[key], array)
        assert describe_archive(tmp_path / "x.npz") == [(k, a.shape, str(a.dtype)) for k, a in want.items()]


def test_zeros_that_pack_a_thousandfold_are_read(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((1000, 500, 100), "f4"))
    assert (tmp_path / "x.npz").stat().st_size < 2**20
    assert read_archive(tmp_path / "x.npz")["x"].shape == (1000, 500, 100)


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MEMBERS", 3)
    np.savez(tmp_path / "x.npz", **{str(i): np.ones(1) for i in range(4)})
    with pytest.raises(UserError, match="must hold at most 3 arrays, got more"):
        read_archive(tmp_path / "x.npz")


def test_damage_anywhere_is_one_sentence(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x.npz"
    np.savez_compressed(path, a=rng.normal(size=40), b=np.array(["u", "v"]), c=np.arange(5))
    whole, outcomes = path.read_bytes(), set()
    for i in range(300):
        damaged = bytearray(whole)
        for _ in range(1 + i % 3):
            damaged[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged if i % 10 else whole[: rng.integers(len(whole))])
        try:
            outcomes.add(len(read_archive(path)))
        except UserError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes >= {3, "refused"}
