"""Vectors for words from a text file."""

import os
import re

import numpy as np
import pytest

from mmfast.data import MultimodalData, MultimodalDataset
from mmfast.data.embedding import embed, vectors
from mmfast.errors import UserError

GLOVE = "the 0.5 -1e-1 2\n. . . 1 2 3\nsp 9 9 9\ncafé 4 5 6\nthe 7 7 7\nname@domain.com 1 1 1\n"


def write(tmp_path, text):
    path = tmp_path / "glove.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def dataset(words, first=0, modality="audio", **kwargs):
    values = {modality: [np.ones((len(w), 2)) for w in words]}
    n = len(words)
    return MultimodalDataset(values, np.zeros(n), range(first, first + n), words=words, **kwargs)


def test_words_become_text_a_step_each(tmp_path):
    train = dataset([["the", "sp", "xyzzy"], ["café", "xyzzy"], []], groups={"video": ["a", "a", "b"]})
    test = dataset([[". . .", "the"]], first=3)
    data = MultimodalData(train=train, test=test, unlabelled=train, warnings=("one",))
    got = embed(data, write(tmp_path, GLOVE))
    assert got.features == {"text": 3, "audio": 2} and got.modalities == ("text", "audio")
    assert got.train.lengths("text").tolist() == [3, 2, 0]
    assert np.array_equal(
        got.train[0].values["text"], np.array([[0.5, -0.1, 2], [0] * 3, [0] * 3], np.float32)
    )
    assert got.train[1].values["text"].tolist() == [[4, 5, 6], [0, 0, 0]]
    assert got.test[0].values["text"].tolist()[0] == [1, 2, 3]
    assert got.unlabelled is got.train
    assert got.train.groups == {"video": ["a", "a", "b"]} and got.train.words[1] == ["café", "xyzzy"]
    unknown = "1 of 5 words (2 steps) have no vector in glove.txt and are 0, such as xyzzy"
    assert got.warnings == ("one", unknown)
    assert not got.train.unaligned().any()


@pytest.mark.parametrize(
    "text",
    [
        GLOVE,
        "6 3\n" + GLOVE,
        GLOVE.replace("\n", " \n"),
        GLOVE.replace("\n", "\r\n"),
        "\n" + GLOVE,
        ". . . 1 2 3\n" + GLOVE,
        "0.25 1 2 3\n" + GLOVE,
        GLOVE + "some longer name 1 2 3",
    ],
)
def test_forms_of_the_file(tmp_path, text):
    found, features = vectors(write(tmp_path, text), ["the", ". . .", "café", "nowhere", ""])
    assert features == 3 and {w: v.tolist() for w, v in found.items()} == {
        "the": [0.5, pytest.approx(-0.1), 2],
        ". . .": [1, 2, 3],
        "café": [4, 5, 6],
    }
    assert all(v.dtype == np.float32 for v in found.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GLOVE + "cut 1 2\n", "line 7 must be a word and 3 numbers as the first line, got 2"),
        (GLOVE + "long 1 2 3 4\n", "line 7 must be a word and 3 numbers as the first line, got 4"),
        (GLOVE + "word 1 x 3\n", "line 7 must be a word and numbers, got 'x'"),
        (GLOVE + "lonely", "line 7 must be a word and 3 numbers as the first line, got 0"),
        ("hello world\n", "line 1 must be a word and numbers, got 'world'"),
        (b"\x80\x04\x95\x00\x00", "line 1 must be a word and numbers, got"),
        (b"\x00" * (1 << 21), "line 1 must be a word and at most 1,048,576 bytes, got more"),
        ("", "vectors must be lines of a word and its numbers, got an empty file"),
        ("\n\n", "vectors must be lines of a word and its numbers, got an empty file"),
        ("5 300\n", "vectors must be lines of a word and its numbers, got an empty file"),
    ],
)
def test_a_damaged_line_is_told(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=re.escape(f"{path}: {message}")) as caught:
        vectors(path, ["the", "word"])
    assert "\n" not in str(caught.value)


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe: must be a regular file, got a FIFO"):
        vectors(tmp_path / "pipe", ["the"])


def test_data_that_need_no_vectors_are_refused(tmp_path):
    path = write(tmp_path, GLOVE)
    silent = MultimodalData(train=MultimodalDataset({"audio": [np.ones((2, 2))]}))
    with pytest.raises(UserError, match=r"must be for text that comes as words only, got none in data"):
        embed(silent, path)
    with pytest.raises(UserError, match=r"must be for text that comes as words only, got vectors in data"):
        embed(MultimodalData(train=dataset([["the"]], modality="text")), path)
    with pytest.raises(UserError, match=r"must have a vector of one of the 1 words of data, got none"):
        embed(MultimodalData(train=dataset([["nowhere"]])), path)
