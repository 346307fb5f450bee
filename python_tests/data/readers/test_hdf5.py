"""HDF5 files that were made to do harm: nothing outside of the file is read, and what it costs is bounded."""

import os
import re
import resource
import time
import zlib

import h5py
import numpy as np
import pytest

from mmfast.data.readers import hdf5
from mmfast.data.readers.hdf5 import describe_hdf5, open_hdf5
from mmfast.errors import UserError

CANARY = 12345.0


def read_all(path):
    with open_hdf5(path) as file:
        return {key: file.read(key, array) for key, array in file.arrays().items()}


@pytest.fixture
def outside(tmp_path):
    """A file beside the one that is read, in a folder of its own; whoever reads it gets the canary."""
    folder = tmp_path / "outside"
    folder.mkdir()
    with h5py.File(folder / "canary.h5", "w") as file:
        file["d1"] = np.full((4, 3), CANARY)
    np.full((4, 3), CANARY).tofile(folder / "canary.bin")
    os.mkfifo(folder / "fifo")
    return folder


def external_link(file, outside):
    file["d1"] = h5py.ExternalLink(str(outside / "canary.h5"), "d1")


def external_link_to_a_fifo(file, outside):
    file["d1"] = h5py.ExternalLink(str(outside / "fifo"), "d1")


def external_storage(file, outside):
    raw = [(str(outside / "canary.bin"), 0, 96)]
    file.create_dataset("d1", (4, 3), "f8", external=raw)


def virtual(file, outside, name="canary.h5", shape=(4, 3)):
    layout = h5py.VirtualLayout(shape=shape, maxshape=(None, 3), dtype="f8")
    source = h5py.VirtualSource(str(outside / name), "d1", shape=shape, maxshape=(None, 3))
    layout[: h5py.h5s.UNLIMITED, :] = source[: h5py.h5s.UNLIMITED, :]
    file.create_virtual_dataset("d1", layout)


def virtual_of_a_fifo(file, outside):
    virtual(file, outside, "fifo")


def soft_link(file, outside):
    file["other"] = np.ones(3)
    file["d1"] = h5py.SoftLink("/other")


def soft_loop(file, outside):
    file["a"], file["b"] = h5py.SoftLink("/b"), h5py.SoftLink("/a")


def hard_cycle(file, outside):
    file.create_group("a/b")
    file["a/b/c"] = file["a"]


def root_in_itself(file, outside):
    file["again"] = file["/"]


def second_name(file, outside):
    file["d1"] = np.ones(3)
    file["d2"] = file["d1"]


def deep(file, outside):
    file.create_group("/".join("g" * 5000))


def huge(file, outside):
    space = h5py.h5s.create_simple((10**9, 1500))
    h5py.h5d.create(file.id, b"d1", h5py.h5t.NATIVE_DOUBLE, space)


def huge_chunked(file, outside):
    file.create_dataset("d1", (2**40,), "f8", chunks=(1024,))


def huge_chunk(file, outside):
    file.create_dataset("d1", (1,), "f8", chunks=(2**28,), maxshape=(None,), compression="gzip")


def many_large(file, outside):
    for i in range(100):
        file.create_dataset(f"d{i}", (2**23,), "f8", chunks=(2**16,), compression="gzip")


def bomb(file, outside):
    node = file.create_dataset("d1", (1024,), "f8", chunks=(1024,), compression="gzip")
    deflate = zlib.compressobj(9)
    packed = b"".join(deflate.compress(bytes(2**24)) for _ in range(64)) + deflate.flush()
    node.id.write_direct_chunk((0,), packed)


def one_text_many_times(file, outside):
    file["d1"] = np.zeros((20_000, 16), "u1")  # as much heap as the elements below point into
    node = file.create_dataset("words", (4_000,), h5py.string_dtype())
    node[:1] = "x" * 2**20
    del file["d1"]
    raw = node.id.get_offset()
    file.flush()
    with open(file.filename, "r+b") as plain:
        plain.seek(raw)
        first = plain.read(16)
        plain.seek(raw)
        plain.write(first * 4_000)


def compound(file, outside):
    file["d1"] = np.zeros(3, [("a", "f4"), ("b", "i4")])


def opaque(file, outside):
    file["d1"] = np.array([np.void(b"abc")])


def lists(file, outside):
    file.create_dataset("d1", (2,), h5py.vlen_dtype(np.float32))


def references(file, outside):
    file["target"] = np.ones(3)
    file.create_dataset("d1", data=[file["target"].ref], dtype=h5py.ref_dtype)


def region_references(file, outside):
    file["target"] = np.ones(3)
    file.create_dataset("d1", data=[file["target"].regionref[:2]], dtype=h5py.regionref_dtype)


def unknown_filter(file, outside):
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk((4,))
    made.set_filter(54321, h5py.h5z.FLAG_OPTIONAL, (1,))
    h5py.h5d.create(file.id, b"d1", h5py.h5t.NATIVE_DOUBLE, h5py.h5s.create_simple((4,)), made)


def scale_offset(file, outside):
    file.create_dataset("d1", data=np.arange(64), chunks=(8,), scaleoffset=0)


def nothing(file, outside):
    file["d1"] = h5py.Empty("f4")


HOSTILE = [
    (external_link, "d1 must lie in the file itself, got an external link"),
    (external_link_to_a_fifo, "d1 must lie in the file itself, got an external link"),
    (external_storage, "d1 must lie in the file itself, got external storage"),
    (virtual, "d1 must lie in the file itself, got a virtual data set"),
    (virtual_of_a_fifo, "d1 must lie in the file itself, got a virtual data set"),
    (soft_link, "d1 must lie in the file itself, got a soft link"),
    (soft_loop, "a must lie in the file itself, got a soft link"),
    (hard_cycle, "a/b/c must be an object of its own, got a again"),
    (root_in_itself, "again must be an object of its own, got / again"),
    (second_name, "d2 must be an object of its own, got d1 again"),
    (deep, "groups must be at most 8 deep, got g/g"),
    (huge, "d1 must hold at most 512.0 MiB"),
    (huge_chunked, "d1 must hold at most 512.0 MiB"),
    (huge_chunk, "d1 must hold at most 512.0 MiB"),
    (many_large, "d16 must hold at most 512.0 MiB with all arrays before it"),
    (bomb, "d1 must inflate to its shape, got a chunk that holds more"),
    (one_text_many_times, "words must hold at most 512.0 MiB"),
    (compound, "d1 must hold numbers or text, got compound"),
    (opaque, "d1 must hold numbers or text, got opaque"),
    (lists, "d1 must hold numbers or text, got lists of any length"),
    (references, "d1 must hold numbers or text, got a reference"),
    (region_references, "d1 must hold numbers or text, got a reference"),
    (unknown_filter, "d1 must be packed by gzip, szip or LZF, got filter 54321"),
    (scale_offset, "d1 must be packed by gzip, szip or LZF, got filter 6"),
    (nothing, "d1 must hold numbers or text, got nothing"),
]


@pytest.mark.parametrize(("write", "message"), HOSTILE, ids=[w.__name__ for w, _ in HOSTILE])
def test_a_hostile_file_gives_one_sentence(tmp_path, outside, write, message):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        write(file, outside)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)) as caught:
        read_all(path)
    assert "\n" not in str(caught.value) and str(CANARY) not in str(caught.value)
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1.5 * 2**20


def test_what_is_stored_in_any_honest_way_is_read(tmp_path):
    path, rng = tmp_path / "x.h5", np.random.default_rng(0)
    want = {
        "big": rng.normal(size=(5, 3)).astype(">f8"),
        "chunked": rng.integers(0, 9, (40, 7)),
        "half": rng.normal(size=4).astype("f2"),
        "plain": rng.normal(size=(2, 3, 4)).astype("f4"),
        "truth": np.array([True, False]),
    }
    with h5py.File(path, "w") as file:
        file["named"] = np.dtype("f4")
        file["of_that_type"] = h5py.Empty("f4")
        del file["of_that_type"]
        file.create_dataset("typed", data=want["plain"], dtype=file["named"])
        for key, value in want.items():
            how = {"chunks": (8, 7), "compression": "gzip", "shuffle": True} if key == "chunked" else {}
            file.create_dataset(f"deep/{key}", data=value, **how)
        file["deep/scalar"] = 3.5
        file["deep/none"] = np.zeros((0, 3))
        # Most of it was never written, and takes no place.
        file.create_dataset("deep/sparse", (100, 50, 20), "f4", chunks=(1, 50, 20), compression="gzip")[3] = 1
    found = read_all(path)
    for key, value in want.items():
        assert found[f"deep/{key}"].dtype == value.dtype and np.array_equal(found[f"deep/{key}"], value)
    assert np.array_equal(found["typed"], want["plain"])
    assert found["deep/scalar"] == 3.5 and found["deep/none"].shape == (0, 3)
    assert found["deep/sparse"].sum() == 1000
    assert ("deep/big", (5, 3), "float64") in [
        (k, s, d.replace(">f8", "float64")) for k, s, d in describe_hdf5(path)
    ]
    with open_hdf5(path) as file:
        assert file.children() == ["deep", "named", "typed"] and file.children("deep/big") == []
        assert file.children("nowhere") == []


def test_a_well_packed_file_of_zeros_is_read(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset(
            "d1", data=np.zeros((2000, 50, 100), "f4"), chunks=(2000, 50, 100), compression="gzip"
        )
    assert (tmp_path / "x.h5").stat().st_size < 100_000
    assert read_all(tmp_path / "x.h5")["d1"].shape == (2000, 50, 100)


def test_text_is_read_in_all_its_forms(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["fixed"] = np.array([["Zoë".encode()], [b"Zo\xeb"], [b""]])
        file.create_dataset("any", data=["Zoë", "", "sp" * 5000], dtype=h5py.string_dtype())
        file.create_dataset("ascii", data=[b"Zo\xeb", b"b"], dtype=h5py.string_dtype("ascii"))
        file["one"] = "hello"
    found = read_all(tmp_path / "x.h5")
    assert found["fixed"].tolist() == [["Zoë"], ["Zoë"], [""]]
    assert found["any"].tolist() == ["Zoë", "", "sp" * 5000]
    assert found["ascii"].tolist() == ["Zoë", "b"] and found["one"].tolist() == "hello"


def test_more_objects_than_allowed_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "OBJECTS", 50)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for i in range(10):
            for j in range(10):
                file.create_group(f"{i}/{j}")
    with pytest.raises(UserError, match="must hold at most 50 objects, got more"):
        describe_hdf5(tmp_path / "x.h5")


def test_names_in_any_encoding_are_told_in_one_line(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        h5py.h5g.create(file.id, b"a\xff\nb")
        file.id.links.create_soft(b"a\xff\nb/c", b"/nowhere")
    with pytest.raises(UserError, match=r"must lie in the file itself, got a soft link") as caught:
        describe_hdf5(tmp_path / "x.h5")
    assert str(caught.value).isprintable()


def test_a_pipe_is_never_opened(outside):
    with pytest.raises(UserError, match="fifo: "):
        describe_hdf5(outside / "fifo")


def test_damage_anywhere_is_one_sentence(tmp_path):
    path, rng = tmp_path / "x.h5", np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for i in range(3):
            file.create_dataset(f"g{i}/d", data=rng.normal(size=(20, 3)), chunks=(7, 3), compression="gzip")
            file.create_dataset(f"g{i}/w", data=["a", "bc"] * 4, dtype=h5py.string_dtype())
    whole, outcomes = path.read_bytes(), set()
    for i in range(300):
        damaged = bytearray(whole)
        if i % 10:
            for _ in range(rng.integers(1, 4)):
                damaged[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
        else:
            damaged = damaged[: rng.integers(len(whole))]
        path.write_bytes(damaged)
        try:
            outcomes.add(len(read_all(path)))
        except UserError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes >= {6, "refused"}
