import subprocess
import sys

import h5py
import numpy as np
import pytest

from mmfast.data import load
from mmfast.errors import UserError


def hdf5(path):
    with h5py.File(path, "w") as file:
        file["glove/clip/features"] = np.ones((2, 3))


CASES = [
    ("words.txt", lambda p: p.write_text("hello world"), r"a \.txt file that starts with the bytes 68 65 6c"),
    (
        "data.pkl",
        lambda p: p.write_bytes(b"\x80\x04K\x01."),
        "a pickle of a int",
    ),
    ("bare", lambda p: p.write_text("hello world"), "a nameless file"),
    ("empty.npz", lambda p: p.write_bytes(b""), "an empty file"),
    ("other.csd", hdf5, "an HDF5 file with glove/clip/features"),
    ("cut.csd", lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n"), "an HDF5 file that cannot be read"),
    ("foreign.npz", lambda p: np.savez(p, x=np.ones(2), y=np.ones(2)), r"an archive with x\.npy, y\.npy"),
    ("cut.npz", lambda p: p.write_bytes(b"PK\x03\x04half"), "an archive that is truncated or damaged"),
    ("folder", lambda p: p.mkdir(), "a folder with nothing in it"),
]


@pytest.mark.parametrize(("name", "make", "message"), CASES)
def test_unknown_content_is_listed(tmp_path, name, make, message):
    path = tmp_path / name
    make(path)
    with pytest.raises(UserError, match=f"load: .*{name} is of no known kind: found {message}") as caught:
        load(path)
    assert "an HDF5 folder of MFN" in str(caught.value) and "an mmfast .npz file" in str(caught.value)


def test_long_folders_are_cut(tmp_path):
    for i in range(9):
        (tmp_path / f"f{i}").touch()
    with pytest.raises(UserError, match="f0, f1, f2, f3, f4, f5 and 3 more"):
        load(tmp_path)


def test_an_incomplete_corpus_folder_is_still_recognised(tmp_path):
    (tmp_path / "y_train.h5").touch()
    with pytest.raises(UserError, match=r"y_train\.h5: not a readable HDF5 file"):
        load(tmp_path)


def test_options_belong_to_their_source(tmp_path):
    assert len(load("synthetic", samples=20, features={"text": 2}).train) == 14
    with pytest.raises(UserError, match=r"synthetic takes the options .*, got 'size'"):
        load("synthetic", size=3)
    with pytest.raises(UserError, match=r"a path takes the options labels, .*, got 'samples'"):
        load(tmp_path, samples=3)


def test_no_such_path():
    with pytest.raises(UserError, match="load: nowhere does not exist"):
        load("nowhere")


def test_importing_data_loads_no_reader():
    code = "import sys, mmfast.data; print([m for m in ('h5py', 'sklearn', 'lightning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
