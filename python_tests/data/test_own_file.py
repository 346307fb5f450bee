import errno
import json
import math
import os

import numpy as np
import pytest
import torch

from mmfast.data import DataWriter, MultimodalData, MultimodalDataset, divide, load, planned, save
from mmfast.data.mapped import PREFIX
from mmfast.data.readers.own import verify
from mmfast.errors import UserError
from python_tests.layouts import own as layout

SPLITS = ("train", "valid", "test", "unlabelled", "cross_validation")


def dataset(size=7, first_id=0, **more):
    rng = np.random.default_rng(first_id)
    lengths = rng.integers(0, 5, size)
    text = [rng.normal(size=(n, 3)).astype(np.float32) for n in lengths]
    text[2] = np.array([[np.nan, np.inf, -np.inf], [0, -0.0, 1e-40]], np.float32)
    return MultimodalDataset(
        {"text": text, "pose": [rng.normal(size=(n + 1, 2)) for n in lengths]},
        ids=np.arange(first_id, first_id + size),
        names=[f"café {i}" for i in range(size)],
        groups={"speaker": [f"s{i % 2}" for i in range(size)], "a/b": ["x"] * size},
        words=[["ö"] * n + [""] for n in lengths],
        transcripts=[f"t{i}" * i for i in range(size)],
        tokens=[np.arange(i) for i in range(size)],
        **more,
    )


def corpus(**more):
    train = dataset(labels=[math.nan, 1, 2, 3, 1, 0, 2])
    test = dataset(5, 50, labels=[1, math.nan, 2, 0, 1])
    kind = {"label_range": (0, 5), "targets": ["mood"]} | more
    return MultimodalData(
        train,
        test=test,
        unlabelled=train,
        cross_validation=test.subset([3, 1]),
        name="mine",
        warnings=["odd"],
        padding="front",
        layout="some pickle",
        sample_rate=8000,
        **kind,
    )


def assert_same(a, b):
    assert a.features == b.features and torch.equal(a.ids, b.ids)
    for field in ("names", "groups", "words", "transcripts", "task", "targets"):
        assert getattr(a, field) == getattr(b, field), field
    assert (a.tokens is None) == (b.tokens is None)
    for mine, theirs in zip(a.tokens or [], b.tokens or [], strict=True):
        assert np.array_equal(mine, theirs) and mine.dtype == np.int32
    assert np.array_equal(a.labels, b.labels, equal_nan=True)
    assert torch.equal(a.fingerprints(), b.fingerprints())
    for modality in a.modalities:
        assert torch.equal(a.lengths(modality), b.lengths(modality))
        mine, theirs = a.flat(modality), b.flat(modality)
        assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_round_trip_is_bit_identical(task, tmp_path):
    more = {"label_range": None, "targets": ["a", "b", "c", "d"], "task": task}
    data = corpus(**(more if task == "classification" else {}))
    path = tmp_path / "mine.mmfast"
    save(data, path)
    back = load(path)
    for field in ("name", "label_range", "task", "targets", "warnings", "padding", "layout", "sample_rate"):
        assert getattr(back, field) == getattr(data, field), field
    for split in SPLITS:
        assert_same(getattr(back, split), getattr(data, split))
    assert back.unlabelled is back.train
    assert back.fingerprint() == data.fingerprint()
    assert [p.name for p in tmp_path.iterdir()] == ["mine.mmfast"]
    verify(path)
    save(back, tmp_path / "again.mmfast")
    assert (tmp_path / "again.mmfast").read_bytes() == path.read_bytes()


def test_how_folds_are_made_stays_with_the_data(tmp_path):
    speakers = {"speaker": ["a", "b", "c", "a", "b", "c", "a"]}
    text = [np.ones((n, 3)) for n in range(7)]
    given = MultimodalDataset({"text": text}, labels=range(7), groups=speakers)
    folded = divide(MultimodalData(train=given), "speaker", seed=3)
    save(folded, tmp_path / "a.mmfast")
    read = load(tmp_path / "a.mmfast")
    assert read.protocol == folded.protocol and read.protocol is not None
    assert read.fingerprint() == folded.fingerprint()


def test_safetensors_reads_the_file(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    data, path = corpus(), tmp_path / "mine.mmfast"
    save(data, path)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "mmfast-data 2"
        assert torch.equal(file.get_tensor("test/pose/values"), data.test.flat("pose"))
        assert bytes(file.get_tensor("test/names/bytes")).decode() == "".join(data.test.names)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_values_are_rounded_once_and_read_as_float32(dtype, tmp_path):
    data = MultimodalData(corpus().test)
    save(data, tmp_path / "x.mmfast", dtype=dtype)
    back = load(tmp_path / "x.mmfast").train
    wanted = data.train.flat("pose").to(getattr(torch, dtype)).to(torch.float32)
    assert back.flat("pose").dtype == torch.float32 and torch.equal(back.flat("pose"), wanted)
    verify(tmp_path / "x.mmfast")
    assert not torch.equal(back.fingerprints(), data.train.fingerprints())


def test_values_beyond_float16_are_refused_and_nothing_is_left(tmp_path):
    data = MultimodalDataset({"text": [np.full((2, 1), 1e6)]})
    with pytest.raises(UserError, match="text must be within 65504 in float16, got 1e"):
        save(data, tmp_path / "x.mmfast", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_samples_of_similar_length_lie_together_with_their_names(tmp_path):
    data = corpus()
    save(data, tmp_path / "x.mmfast", sort="length")
    back = load(tmp_path / "x.mmfast")
    assert back.train.longest().tolist() == sorted(data.train.longest().tolist())
    assert back.train.names != data.train.names and back.fingerprint() == data.fingerprint()
    assert dict(zip(back.train.names, back.train.transcripts, strict=True)) == dict(
        zip(data.train.names, data.train.transcripts, strict=True)
    )
    assert back.unlabelled is back.train


def test_writer_takes_samples_one_after_another(tmp_path):
    whole, path = dataset(), tmp_path / "x.mmfast"
    plan = planned(whole.features, {m: whole.lengths(m) for m in whole.modalities}, names=whole.names)
    with DataWriter(path, MultimodalData(plan)) as writer:
        for sample in whole:
            writer.add("train", sample.values)
            assert not path.exists()
    back = load(path).train
    assert back.names == whole.names and torch.equal(back.fingerprints(), whole.fingerprints())


def test_writer_refuses_what_was_not_planned(tmp_path):
    plan = MultimodalData(planned({"text": 2}, {"text": [1, 3]}))
    with (
        pytest.raises(UserError, match="train must get its 2 samples, got 1"),
        DataWriter(tmp_path / "x", plan) as writer,
    ):
        writer.add("train", {"text": torch.ones(1, 2)})
    with (
        pytest.raises(UserError, match=r"\(1, 2\) floating point, got \(2, 2\)"),
        DataWriter(tmp_path / "x", plan) as writer,
    ):
        writer.add("train", {"text": torch.ones(2, 2)})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "x.mmfast"
    save(dataset(), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"cannot be written .No space left on device"):
        save(dataset(5), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_npz_refuses_what_it_has_no_place_for(tmp_path):
    with pytest.raises(UserError, match=r"tokens have no place in a .npz file"):
        save(dataset(), tmp_path / "x.npz")


def test_verify_names_changed_samples(tmp_path):
    path = tmp_path / "x.mmfast"
    save(MultimodalData(dataset()), path)
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:PREFIX], "little")
    start = json.loads(raw[PREFIX : PREFIX + length])["train/pose/values"]["data_offsets"][0]
    raw[PREFIX + length + start] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="others in 1 samples, first 'café 0'"):
        verify(path)


def parts(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:PREFIX], "little")
    return json.loads(raw[PREFIX : PREFIX + length]), raw[PREFIX + length :]


def put_together(path, header, body):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(PREFIX, "little") + text + body)


def describe(change):
    """A change of the JSON that describes the data."""

    def of_header(header):
        data = json.loads(header["__metadata__"]["data"])
        made = change(data)
        data = data if made is None else made
        header["__metadata__"]["data"] = json.dumps(data)

    return of_header


def entry(key, **changes):
    return lambda header: header[key].update(changes)


def in_split(**changes):
    return describe(lambda data: data["splits"]["train"].update(changes))


HEADERS = {
    "overlap": (
        lambda h: h["train/ids"].update(data_offsets=[at - 8 for at in h["train/ids"]["data_offsets"]]),
        "must begin at byte",
    ),
    "out of range": (entry("train/ids", data_offsets=[1 << 40, (1 << 40) + 64]), "must begin at byte"),
    "negative": (entry("train/ids", data_offsets=[-8, 56]), "must be whole numbers"),
    "backwards": (entry("train/ids", data_offsets=[64, 0]), "must be aligned and hold its 64 bytes"),
    "too large": (entry("train/ids", shape=[1 << 61]), "must be aligned and hold its"),
    "huge": (entry("train/ids", shape=[1 << 80]), "must be whole numbers"),
    "three dimensions": (entry("train/ids", shape=[2, 2, 2]), "two dimensions at most"),
    "bool": (entry("train/ids", shape=[True]), "must be whole numbers"),
    "other dtype": (entry("train/ids", dtype="F64"), "train/ids must be of F32"),
    "dtype no text": (entry("train/ids", dtype=[1]), "train/ids must be of F32"),
    "wrong dtype": (entry("train/text/offsets", dtype="I32", shape=[18]), "train/text/offsets must be I64"),
    "no entry": (lambda h: h.update({"train/ids": 3}), "must have dtype, shape and data_offsets"),
    "metadata a number": (lambda h: h["__metadata__"].update(data=3), "__metadata__ must be texts"),
    "metadata a list": (lambda h: h.update(__metadata__=["mmfast-data 2"]), "__metadata__ must be texts"),
    "another version": (lambda h: h["__metadata__"].update(format="mmfast-data 9"), "format must be"),
    "no JSON": (lambda h: h["__metadata__"].update(data="{"), "data must be JSON"),
    "JSON a list": (lambda h: h["__metadata__"].update(data="[]"), "data must be a JSON object"),
    "nested": (lambda h: h["__metadata__"].update(data='{"a":' + "[" * 99999), "data must be JSON"),
    "nothing said": (describe(lambda d: {}), "data must have label_range"),
    "name": (describe(lambda d: d.update(name=3)), "data.name must be a text"),
    "task": (describe(lambda d: d.update(task=["x"])), "data.task must be one of"),
    "targets": (describe(lambda d: d.update(targets="abc")), "data.targets must be a list"),
    "other targets": (describe(lambda d: d.update(targets=["a", "b"])), "labels must be 2 a sample"),
    "range": (
        describe(lambda d: d.update(label_range=[3, math.nan])),
        "data.label_range must be two numbers",
    ),
    "range falls": (describe(lambda d: d.update(label_range=[3, 1])), "two increasing numbers"),
    "rate": (describe(lambda d: d.update(sample_rate=-1)), "data.sample_rate must be a rate"),
    "warnings": (describe(lambda d: d.update(warnings=[3])), "data.warnings must be"),
    "no splits": (describe(lambda d: d.update(splits={})), "data.splits must describe"),
    "a foreign split": (describe(lambda d: d.update(splits={"dev": {}})), "data.splits must be among"),
    "a split of none": (describe(lambda d: d["splits"].update(train="test")), "must name a split before it"),
    "a split no object": (
        describe(lambda d: d["splits"].update(train=3)),
        "must have samples and modalities",
    ),
    "samples": (in_split(samples="8"), "samples must be a whole number"),
    "samples of a float": (in_split(samples=8.0), "samples must be a whole number"),
    "other samples": (in_split(samples=9), r"train/ids must be I64 of shape \(9,\)"),
    "many samples": (in_split(samples=1 << 60), "train/ids must be I64"),
    "no modality": (in_split(modalities={}), "at least one modality"),
    "modality": (in_split(modalities={"text": 3}), "must have features and steps"),
    "missing": (in_split(modalities={"smell": {"features": 1, "steps": 1}}), "keys must have train/smell"),
    "features": (in_split(modalities={"text": {"features": 0, "steps": 1}}), "features must be a whole"),
    "groups": (in_split(groups=[3]), "groups must be a list of names"),
    "groups missing": (in_split(groups=["session"]), "keys must have train/groups/session/bytes"),
    "beside": (in_split(beside=["labels"]), "beside must be among"),
    "unknown key": (in_split(groups=["video"]), "keys must be those of the splits"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused_in_one_sentence(name, tmp_path):
    pytest.importorskip("safetensors")
    change, message = HEADERS[name]
    path = layout.write(tmp_path)
    header, body = parts(path)
    change(header)
    put_together(path, header, body)
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


ARRAYS = {
    "offsets that fall": (
        "train/text/offsets",
        lambda x: x[[0, 2, 1, *range(3, len(x))]],
        "must rise from 0",
    ),
    "offsets too far": ("train/text/offsets", lambda x: x * 2, "must rise from 0 to"),
    "offsets below 0": ("train/text/offsets", lambda x: x - 1, "must rise from 0"),
    "offsets of names": ("train/names/offsets", lambda x: x[::-1].copy(), "train/names/offsets must rise"),
    "names no text": (
        "train/names/bytes",
        lambda x: np.full_like(x, 0xFF),
        "train/names/bytes must be UTF-8",
    ),
    "names cut in letters": (
        "train/names/offsets",
        lambda x: np.array([0, x[1] - 1, *x[2:]]),
        "divided between letters",
    ),
    "words of no sample": ("train/words/samples", lambda x: x + 1, "train/words/samples must rise"),
    "infinite labels": ("train/labels", lambda x: x + np.float32(np.inf), "labels must be finite"),
    "repeated ids": ("train/ids", lambda x: x * 0, "ids must be unique"),
    "ids of two splits": ("valid/ids", lambda x: x - x[0], "ids must be unique over the splits"),
    "labels of others": ("train/labels", lambda x: x[:-1].copy(), "train/labels must be F32 of shape"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_do_not_fit_are_refused_in_one_sentence(name, tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    key, change, message = ARRAYS[name]
    found = layout.arrays()
    data = json.dumps(layout.description("regression", found))
    found[key] = np.ascontiguousarray(change(found[key]))
    path = tmp_path / "x.mmfast"
    save_file(found, path, metadata={"format": "mmfast-data 2", "data": data})
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [1 << 60, 1 << 63, 1 << 21])
def test_a_header_beyond_the_file_is_refused(length, tmp_path):
    path = tmp_path / "x.mmfast"
    save(dataset(), path)
    raw = path.read_bytes()
    path.write_bytes(length.to_bytes(PREFIX, "little") + raw[PREFIX:])
    with pytest.raises(UserError, match="the header must lie within"):
        load(path)


def test_a_cut_file_is_refused(tmp_path):
    path = tmp_path / "x.mmfast"
    save(dataset(), path)
    raw = path.read_bytes()
    for size in (len(raw) - 1, len(raw) // 2):
        path.write_bytes(raw[:size])
        with pytest.raises(UserError, match=r"x.mmfast: "):
            load(path)


def test_a_key_that_occurs_twice_is_refused(tmp_path):
    path = tmp_path / "x.mmfast"
    save(dataset(), path)
    header, body = parts(path)
    text = json.dumps(header).replace('"test/ids"', '"test/labels"').encode()
    put_together(path, text, body)
    with pytest.raises(UserError, match=r"the header must be JSON.*a key occurs twice"):
        load(path)
