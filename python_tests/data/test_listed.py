"""Splits that are listed by name."""

import os

import numpy as np
import pytest

from mmfast.data import MultimodalData, MultimodalDataset, divide
from mmfast.errors import UserError


def tied(rows):
    """Samples with a video, a speaker and a content each."""
    return MultimodalDataset(
        {"text": [np.full((1, 2), row[2]) for row in rows]},
        [float(row[0] % 3) for row in rows],
        names=[f"name {i}" for i in range(len(rows))],
        groups={"video": [f"v{row[0]}" for row in rows], "speaker": [f"s{row[1]}" for row in rows]},
    )


def ids(dataset):
    return set(dataset.ids.tolist())


def listed(tmp_path, text, name="split.json"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_lists_name_samples_or_videos_and_leave_others_out(tmp_path):
    whole = tied([(i // 4, i, i) for i in range(20)])
    data = MultimodalData(valid=whole, warnings=["before"])
    text = '{"train": ["v0", "v1"], "dev": ["name 8"], "test": ["name 9", "v3"]}'
    parts = divide(data, listed(tmp_path, text))
    assert [ids(p) for p in (parts.train, parts.valid, parts.test)] == [
        set(range(8)),
        {8},
        {9, *range(12, 16)},
    ]
    assert parts.warnings == ("before", "6 of 20 samples are in none of the lists of splits: left out")
    rows = ["split,video", "train,v0", "train,v1", "valid,name 8", "test,name 9", "Test , v3"]
    table = divide(data, listed(tmp_path, "\ufeff" + "\r\n".join(rows), "split.csv"))
    assert [ids(p) for p in (table.train, table.valid, table.test)] == [
        ids(p) for p in (parts.train, parts.valid, parts.test)
    ]
    given = divide(data, {"train": ["s1", "s2"], "test": ["s3"]}, group="speaker")
    assert [ids(given.train), ids(given.test)] == [{1, 2}, {3}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"train": ["v0", "nobody", "none"]}',
            "train must hold names of samples or values of video .* 'nobody' and 1",
        ),
        (
            '{"train": ["v0"], "test": ["name 1"]}',
            "named once, got 'name 1' by 'v0' in train and by 'name 1' in test",
        ),
        ('{"train": ["v0"], "train": ["v1"]}', "the key 'train' stands twice"),
        ('{"train": ["v0"], "eval": ["v1"]}', "a split must be one of train, valid, val.*got 'eval'"),
        ('{"test": ["v0"]}', "train must name at least one sample"),
        ('{"train": "v0"}', "train must be a list of names, got str"),
        ('{"train": [["v0"]]}', "train must hold names, got list"),
        ("[1]", "must hold lists such as"),
        ("{", "must be JSON"),
        ("[" * 100_000, "must be JSON, got a fault: nested too deeply"),
    ],
)
def test_a_list_that_cannot_be_right_is_refused_by_file_and_key(tmp_path, text, message):
    with pytest.raises(UserError, match=f"split.json: .*{message}"):
        divide(MultimodalData(tied([(i // 4, i, i) for i in range(20)])), listed(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,part\n", "columns split and name or video, got name, part"),
        ("", "columns split and name or video, got none"),
        ("name,split\nname 1\n", "line 2 must have 2 cells, got 1"),
        ("name,split\nname 1,left\n", "line 2: a split must be one of .* got 'left'"),
        ('name,split\n"name 1,train\n', "must be CSV"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused_by_its_line(tmp_path, text, message):
    with pytest.raises(UserError, match=f"split.csv: .*{message}"):
        divide(MultimodalData(tied([(i, i, i) for i in range(5)])), listed(tmp_path, text, "split.csv"))


def test_lists_are_read_from_regular_text_files_alone(tmp_path):
    data = MultimodalData(tied([(i, i, i) for i in range(5)]))
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "bytes.json").write_bytes(b'{"train": ["\xff"]}')
    for name, message in (
        ("pipe", "must be a regular file, got a FIFO"),
        ("bytes", "UTF-8, got the byte 0xff"),
        ("x", "no such"),
    ):
        with pytest.raises(UserError, match=f"{name}.json: .*{message}"):
            divide(data, tmp_path / f"{name}.json")
