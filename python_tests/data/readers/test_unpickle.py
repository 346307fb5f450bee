"""What pickles of data hold is read exactly; whatever else they ask for is neither run nor waited for."""

import collections
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.data.readers.unpickle import is_pickle, load_torch, unpickle
from mmfast.data.source import Source
from mmfast.errors import UserError

CONTENT = {
    "floats": np.linspace(-1, 1, 24).reshape(2, 3, 4),
    "big endian": np.arange(6, dtype=">f4"),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "axes": np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
    "empty": np.zeros((0, 3)),
    "one": np.array(3.5),
    "bools": np.array([True, False]),
    "bytes": np.array([b"xy", b"z"]),
    "text": np.array(["a", "déjà", ""]),
    "ragged": np.array([np.zeros(3), np.ones((2, 2))], dtype=object),
    "objects": np.array(["word", None, 3], dtype=object),
    "number": np.float32(2.5),
    "name": np.str_("hé"),
    "plain": [1, 2.5, 10**30, -3, True, None, "é", b"\xff\x00", bytearray(b"ab"), 1 + 2j, (1, (2,)), {1, 2}],
    "ordered": collections.OrderedDict(a=1, b=[2]),
    "default": collections.defaultdict(list, {1: [2]}),
    "slice": [slice(1, 2), range(3), frozenset({3})],
}


def assert_same(got, wanted) -> None:
    if isinstance(wanted, np.ndarray):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    if isinstance(wanted, (list, tuple)) or (isinstance(wanted, np.ndarray) and wanted.dtype.kind == "O"):
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            assert_same(a, b)
    else:
        np.testing.assert_array_equal(got, wanted)


def write(folder, content: bytes):
    path = folder / "data.pkl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_what_python_3_writes_is_read_exactly(tmp_path, protocol):
    # numpy 1 names other modules of itself.
    raw = pickle.dumps(CONTENT, protocol)
    old = raw.replace(b"numpy._core.", b"numpy.core.") if protocol < 4 else raw
    for content in (raw, old):
        path = write(tmp_path, content)
        assert is_pickle(path)
        found = unpickle(path)
        assert found.keys() == CONTENT.keys()
        for key, wanted in pickle.loads(raw).items():
            assert_same(found[key], wanted)


PYTHON_2 = b"".join(
    [
        b"\x80\x02}q\x01(U\x05audioq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b",
        b"\x87Rq\x05(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x06U\x02f4K\x00K\x01\x87Rq\x07(K\x03U\x01<NNNJ\xff\xff\xff\xff",
        b"J\xff\xff\xff\xffK\x00tb\x89T",
        struct.pack("<I", 24),
        np.array([[1.5, -2, np.nan], [0, np.inf, 3e-39]], "<f4").tobytes(),
        b"tbU\x02idq\x08]q\x09(U\x02\xc3\xa9X\x02\x00\x00\x00\xc3\xa9eU\x05speakc__builtin__\nset\n]U\x01aa\x85R",
        b"U\x05orderccollections\nOrderedDict\n](](U\x01kK\x01ee\x85RU\x04longq\x0aL12L\nu.",
    ]
)


def test_what_python_2_writes_is_read(tmp_path):
    found = unpickle(write(tmp_path, PYTHON_2))
    np.testing.assert_array_equal(found["audio"], np.float32([[1.5, -2, np.nan], [0, np.inf, 3e-39]]))
    assert found["id"] == ["Ã©", "é"] and found["speak"] == {"a"} and found["order"] == {"k": 1}
    assert found["long"] == 12


def test_protocol_0_of_python_2(tmp_path):
    content = b"(dp1\nS'text'\np2\n(lp3\nS'caf\\xe9'\np4\naVl\\u00e9\np5\naF1.5\naI01\naI7\naL5L\nas."
    path = write(tmp_path, content)
    assert is_pickle(path)
    assert unpickle(path) == {"text": ["café", "lé", 1.5, True, 7, 5]}


@pytest.mark.parametrize("new", [True, False])
def test_files_of_torch_are_read_as_arrays(tmp_path, new):
    content = {
        "plain": torch.arange(12.0).reshape(3, 4),
        "turned": torch.arange(12.0).reshape(3, 4).T,
        "half": torch.tensor([1.5, -2], dtype=torch.bfloat16),
        "ids": [torch.arange(3)],
        "array": np.arange(3.0),
        "wide": torch.ones(1, 4).expand(3, 4),
        "none": torch.zeros(0, 3),
    }
    path = tmp_path / "data.pt"
    torch.save(content, path, _use_new_zipfile_serialization=new)
    assert not is_pickle(path) and Source(path).kind == "torch"
    for found in (load_torch(path), unpickle(write(tmp_path, pickle.dumps(content)))):
        assert found["ids"][0].tolist() == [0, 1, 2]
        for key in content.keys() - {"ids"}:
            wanted = content[key]
            wanted = wanted.float().numpy() if isinstance(wanted, torch.Tensor) else wanted
            np.testing.assert_array_equal(found[key], wanted)
            assert found[key].dtype == wanted.dtype


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


TOUCH = text("touch canary")


def array_of(state: bytes) -> bytes:
    return b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R" + state + b"b"


OBJECTS = b"cnumpy\ndtype\nX\x02\x00\x00\x00O8\x89\x88\x87R"
CALLS = {
    "posix.system": [
        b"cposix\nsystem\n(S'touch canary'\ntR.",
        b"(S'touch canary'\niposix\nsystem\n.",
        b"(cposix\nsystem\nS'touch canary'\no.",
        b"\x80\x04" + text("posix") + text("system") + b"\x93" + TOUCH + b"\x85R.",
        b"\x80\x02cposix\nsystem\n" + TOUCH + b"\x85\x81.",
        b"\x80\x04cposix\nsystem\n)}\x92.",
        b"\x80\x02}cposix\nsystem\nb.",
        b"\x80\x02"
        + array_of(b"(K\x01K\x01\x85" + OBJECTS + b"\x89]cposix\nsystem\n" + TOUCH + b"\x85Rat")
        + b".",
    ],
    "collections._sys.stdout.write": [
        b"\x80\x04" + text("collections") + text("_sys.stdout.write") + b"\x93" + text("canary") + b"\x85R."
    ],
    "__builtin__.eval": [b'c__builtin__\neval\n(S\'open("canary","w")\'\ntR.'],
    "builtins.getattr": [b"cbuiltins\ngetattr\n(cbuiltins\ndict\nS'get'\ntR."],
    "subprocess.Popen": [b"csubprocess\nPopen\n((lS'touch'\naS'canary'\natR."],
    "numpy.memmap": [b"cnumpy\nmemmap\n(S'canary'\nS'f4'\nS'w+'\nI0\n(I1\nttR."],
    "numpy.fromfile": [b"cnumpy\nfromfile\n(S'/etc/passwd'\ntR."],
    "numpy.ndarray.tofile": [b"cnumpy\nndarray.tofile\n(S'canary'\ntR."],
    "torch.serialization.load": [b"ctorch.serialization\nload\n(S'canary'\ntR."],
    "functools.partial": [b"cfunctools\npartial\n(cbuiltins\nprint\ntR."],
}


@pytest.mark.parametrize("name,content", [(name, c) for name, contents in CALLS.items() for c in contents])
def test_no_call_is_run_and_its_name_is_told(tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"holds {name}, which is code or an unknown type"):
        unpickle(write(tmp_path, content))
    assert [p.name for p in tmp_path.iterdir()] == ["data.pkl"]


class Call:
    def __reduce__(self):
        return os.system, ("touch canary",)


@pytest.mark.parametrize("new", [True, False])
def test_no_call_in_a_file_of_torch_is_run(tmp_path, monkeypatch, new):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data.pt"
    torch.save([torch.zeros(2), Call()], path, _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match=r"holds (posix|nt)\.system"):
        load_torch(path)
    inner = path.read_bytes()
    if not new:
        content = (
            b"\x80\x03ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(inner)) + inner + b"\x85R."
        )
        with pytest.raises(UserError, match=r"holds (posix|nt)\.system"):
            unpickle(write(tmp_path, content))
    assert not (tmp_path / "canary").exists()


REDUCE = b"\x85R."
STATES = {
    "a state for a name": b"\x80\x02c_codecs\nencode\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.",
    "a state for a dtype": b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R}b.",
    "a structured dtype": b"\x80\x02cnumpy\ndtype\n" + text("i4,f4") + REDUCE,
    "an ndarray that is called": b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7fK\x40\x86" + REDUCE,
    "an ndarray that is made": b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7fK\x40\x86t\x81.",
    "bytes of any size": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x10\xa5\xd4\xe8\x00" + REDUCE,
    "a range of any size": b"\x80\x02cbuiltins\nrange\n\x8a\x06\x00\x10\xa5\xd4\xe8\x00" + REDUCE,
    "a shape of any size": b"\x80\x03"
    + array_of(
        b"(K\x01\x8a\x06\x00\x00\x00\x00\x00\x01K\x02\x86cnumpy\ndtype\n" + text("f4") + b"\x85R\x89C\x00t"
    )
    + b".",
    "a negative shape": b"\x80\x03"
    + array_of(b"(K\x01J\xff\xff\xff\xff\x85cnumpy\ndtype\n" + text("f4") + b"\x85R\x89C\x00t")
    + b".",
    "objects out of bytes": b"\x80\x03"
    + array_of(b"(K\x01K\x01\x85" + OBJECTS + b"\x89C\x0812345678t")
    + b".",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent id": b"\x80\x02K\x01Q.",
    "a persistent line": b"Psomewhere\n.",
    "a buffer": b"\x80\x05\x97.",
    "text that is none": b"\x80\x02X\x03\x00\x00\x00\xed\xa0\x80.",
    "an unfinished one": b"\x80\x02]q\x00",
    "nothing but an end": b"\x80\x02.",
    "no more than its mark": b"\x80\x02",
}


@pytest.mark.parametrize("content", STATES.values(), ids=STATES)
def test_what_is_no_data_is_refused_in_one_sentence(tmp_path, content):
    with pytest.raises(UserError, match=r"data\.pkl: the pickle is truncated or damaged \(.+\)$|three times"):
        unpickle(write(tmp_path, content))


DOUBLING = b"\x80\x02(K\x00tq\x00" + b"".join(b"(h%ch%ctq%c" % (i, i, i + 1) for i in range(40))
EATERS = {
    "memo": lambda: DOUBLING + b".",
    "hash": lambda: DOUBLING + b"}h\x28K\x01s.",
    "set": lambda: b"\x80\x02cbuiltins\nset\n" + DOUBLING[2:] + b"]h\x28a\x85R.",
    "lists": lambda: b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "lists by memo": lambda: (
        b"\x80\x04]"
        + b"\x94]" * 200
        + b"".join(b"j%sj%sa0" % (struct.pack("<I", i), struct.pack("<I", i + 1)) for i in range(199))
        + b"j\0\0\0\0."
    ),
    "itself": lambda: b"\x80\x02]q\x00h\x00a.",
    "tuples": lambda: b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "marks": lambda: b"(" * 200_000 + b"t" * 200_000 + b".",
    "states": lambda: b"\x80\x02" + b"cnumpy\nndarray\n" * 2 + b"\x85b" * 100_000 + b".",
    "bytes": lambda: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b".",
    "buffers": lambda: b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "text": lambda: b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b".",
    "number": lambda: b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "long number": lambda: b"\x80\x02\x8b" + struct.pack("<i", 10**7) + b"\x01" * 10**7 + b".",
    "digits": lambda: b"L" + b"9" * 10**7 + b"L\n.",
    "frame": lambda: b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
    "frames": lambda: (
        b"\x80\x04" + b"".join(b"\x95" + struct.pack("<Q", 9 * (10**5 - i)) for i in range(10**5)) + b"N."
    ),
    "memo index": lambda: b"\x80\x02Nr\xff\xff\xff\x7f.",
    "duplicates": lambda: b"\x80\x02N" + b"2" * 12_000_000 + b".",
    "containers": lambda: b"\x80\x02(" + b"}" * 2_000_000 + b"t.",
    "wide text": lambda: b"\x80\x02X" + struct.pack("<I", 10**8) + "😀".encode() + b"a" * (10**8 - 4) + b".",
    "copies": lambda: (
        b"\x80\x02(cbuiltins\nlist\nq\x00](" + b"N" * 10**6 + b"e\x85q\x01R" + b"h\x00h\x01R" * 10**4 + b"t."
    ),
    "swapped copies": lambda: (
        b"\x80\x03(cnumpy\ndtype\nX\x02\x00\x00\x00i1\x85Rq\x01B"
        + struct.pack("<I", 10**6)
        + b"a" * 10**6
        + b"q\x02"
        + array_of(b"(K\x01J\x40\x42\x0f\x00\x85h\x01\x89h\x02t") * 3000
        + b"t."
    ),
}

MEASURE = """
import resource, sys, time
from mmfast.data.readers.unpickle import unpickle
from mmfast.errors import UserError
names = sys.argv[1:]
for name in names:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        unpickle(name)
        told = "read"
    except UserError as error:
        told = str(error)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(name.rpartition("/")[2], grown, time.process_time() - start, told, sep="|")
"""


def test_eaters_of_memory_and_time_are_refused_within_bounds(tmp_path):
    for name, content in EATERS.items():
        (tmp_path / name).write_bytes(content())
    paths = sorted(map(str, tmp_path.iterdir()), key=os.path.getsize)
    run = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [line.split("|") for line in run.stdout.splitlines()]
    assert len(rows) == len(EATERS)
    for name, grown, seconds, told in rows:
        assert told.startswith(str(tmp_path / name)), (name, told)
        assert int(grown) < 3 * (tmp_path / name).stat().st_size + (64 << 20), (name, grown)
        assert float(seconds) < 10, (name, seconds)


def test_archives_of_torch_that_lie_are_refused(tmp_path):
    good = tmp_path / "good.pt"
    torch.save({"a": torch.zeros(8)}, good)
    with zipfile.ZipFile(good) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}

    def refused(match, compression=zipfile.ZIP_STORED, **changed):
        path = tmp_path / "bad.pt"
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, raw in entries.items():
                archive.writestr(
                    name, changed.get(name.partition("/")[2].replace("/", "_").replace(".", "_"), raw)
                )
        with pytest.raises(UserError, match=match):
            load_torch(path)

    refused("storage of 8 elements in 4 bytes", data_0=b"abcd")
    content = next(raw for name, raw in entries.items() if name.endswith("data.pkl"))
    assert content.count(b"K\x08tq") == 1
    # More elements than there are: torch's own reader reads on, beyond the end.
    refused("elements in 32 bytes", data_pkl=content.replace(b"K\x08tq", b"J\0\0\0\x40tq"))
    refused("in a storage of 8", data_pkl=content.replace(b"K\x08\x85q", b"K\x09\x85q"))
    refused("without compression", zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize("kind", ["folder", "pipe", "missing", "empty"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path, kind):
    path = tmp_path / "data.pkl"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "missing": lambda: None, "empty": path.touch}[
        kind
    ]()
    assert not is_pickle(path)
    for read in (unpickle, load_torch):
        with pytest.raises(UserError, match=r"data\.pkl"):
            read(path)


VALID = [pickle.dumps(CONTENT, protocol) for protocol in range(6)] + [PYTHON_2]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(VALID), st.data())
def test_damaged_pickles_raise_nothing_else(tmp_path_factory, content, data):
    raw = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["flip", "opcode", "cut", "drop", "copy"])):
            case "flip":
                raw[at] = data.draw(st.integers(0, 255))
            case "opcode":
                raw[at] = data.draw(
                    st.sampled_from(b"(.0125BCFGIJKLMNPQRSTUVX]abcdeghijlopqrstu}\x81\x85\x8e\x92\x94")
                )
            case "cut":
                del raw[max(at, 1) :]
            case "drop":
                del raw[at : at + data.draw(st.integers(1, 8))]
                raw = raw or bytearray(b".")
            case "copy":
                raw[at:at] = raw[at : at + 16]
    path = tmp_path_factory.getbasetemp() / "mutated.pkl"
    path.write_bytes(raw)
    is_pickle(path)
    for read in (unpickle, load_torch):
        try:
            read(path)
        except UserError as error:
            assert "\n" not in str(error)
