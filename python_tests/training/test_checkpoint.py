"""Files are whole or not there; foreign ones are refused in one sentence; weights are handed over strictly."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from torch import nn
from training_help import TINY, assert_same, checkpoint, mmfast, train

from mmfast import files
from mmfast.errors import UserError
from mmfast.files import write_atomically, write_json
from mmfast.training.checkpoint import read_checkpoint
from mmfast.training.handover import load_part
from mmfast.training.stages import PRETRAINING, SUPERVISED


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return train("pretrain", tmp_path_factory.mktemp("pretrained")) / "last.ckpt"


class limited_file_size:
    """No file may grow beyond so many bytes, as on a full disk."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_write_replaces_and_leaves_nothing_else(tmp_path):
    write_atomically(tmp_path / "new" / "a", "one")
    write_atomically(tmp_path / "new" / "a", b"two")
    assert (tmp_path / "new" / "a").read_bytes() == b"two"
    assert os.listdir(tmp_path / "new") == ["a"]


def test_json_is_strict(tmp_path):
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [1.5, float("inf"), (2, "x")], "c": None})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [1.5, None, [2, "x"]], "c": None}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_the_previous_file(call, tmp_path, monkeypatch):
    write_atomically(tmp_path / "a", "before")
    monkeypatch.setattr(files.os, call, full_disk)
    with pytest.raises(
        UserError, match=r"cannot save .*a: No space left on device; the previous file is untouched"
    ):
        write_atomically(tmp_path / "a", "after")
    assert (tmp_path / "a").read_text() == "before"
    assert os.listdir(tmp_path) == ["a"]


def test_file_size_limit_leaves_the_previous_file(tmp_path):
    write_atomically(tmp_path / "a", "before")
    with (
        limited_file_size(1000),
        pytest.raises(UserError, match="File too large; the previous file is untouched"),
    ):
        write_atomically(tmp_path / "a", b"x" * 2000)
    assert (tmp_path / "a").read_text() == "before"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="cannot save"):
        write_atomically(tmp_path / "a" / "b", "x")


def test_training_on_a_full_disk_stops_with_one_sentence(tmp_path, capsys):
    with limited_file_size(10_000):
        assert mmfast("pretrain", *TINY, f"--run.folder={tmp_path}") == 2
    error = capsys.readouterr().err
    assert error.startswith("mmfast: cannot save") and error.count("\n") == 1 and "last.ckpt" in error
    assert not list(tmp_path.glob("*.ckpt")) and not list(tmp_path.glob(".*.tmp"))


def test_a_disk_that_fills_up_keeps_the_last_epoch_and_the_run_goes_on_later(
    pretrained, tmp_path, monkeypatch, capsys
):
    fsync, calls = os.fsync, []

    def fills_up(descriptor):
        calls.append(descriptor)
        # Two calls for a file and its folder: environment, inputs, configuration, two epochs.
        return fsync(descriptor) if len(calls) <= 10 else full_disk()

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fills_up)
        assert mmfast("pretrain", *TINY, f"--run.folder={tmp_path}") == 2
    assert "No space left on device; the previous file is untouched" in capsys.readouterr().err
    assert checkpoint(tmp_path / "last.ckpt")["epoch"] == 1
    train("pretrain", tmp_path, "--resume")
    assert_same(checkpoint(tmp_path / "last.ckpt")["state_dict"], checkpoint(pretrained)["state_dict"])


def test_checkpoints_load_with_weights_only(pretrained):
    assert checkpoint(pretrained)["epoch"] == 3
    assert read_checkpoint(pretrained, PRETRAINING)["mmfast"]["kind"] == PRETRAINING


def damaged(kind: str, good: Path, folder: Path) -> Path:
    path = folder / "damaged.ckpt"
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:-1000])
    elif kind == "half":
        path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a checkpoint\n")
    elif kind == "foreign":
        torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, path)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "pickle":
        torch.save({"mmfast": {"kind": PRETRAINING}, "state_dict": {}, "code": nn.Linear(2, 2)}, path)
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    "kind", ["truncated", "half", "empty", "text", "foreign", "tensor", "pickle", "folder", "missing"]
)
def test_what_is_no_checkpoint_is_one_sentence(kind, pretrained, tmp_path):
    with pytest.raises(UserError, match=r"^checkpoint .*damaged\.ckpt: [^\n]+$"):
        read_checkpoint(damaged(kind, pretrained, tmp_path))


def test_another_kind_is_refused(pretrained):
    with pytest.raises(UserError, match="must be of a supervised run, got one of a pretraining run"):
        read_checkpoint(pretrained, SUPERVISED)


def test_encoder_is_handed_over_bit_by_bit(pretrained, tmp_path, capsys):
    """The network starts from exactly the pre-trained encoder (the thesis' code loaded nothing)."""
    folder = train("finetune", tmp_path, f"--from={pretrained}", "--freeze=true", "--supervised.epochs=1")
    state = checkpoint(pretrained)["state_dict"]
    given = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    kept = {
        n: t for n, t in checkpoint(folder / "best.ckpt")["state_dict"].items() if n.startswith("encoder.")
    }
    assert_same(given, kept)
    count = sum(tensor.numel() for tensor in given.values())
    assert f"loaded {len(given)} tensors ({count:,} parameters)" in capsys.readouterr().out


class Parts(nn.Module):
    def __init__(self, inner: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, inner), nn.Linear(inner, 1))
        self.projector = nn.Linear(1, 4)


def test_load_part_counts_and_copies():
    source, target = Parts(), Parts()
    count = load_part(target.encoder, source.state_dict(), "encoder", "x")
    assert count == (4, 2 * 3 + 3 + 3 + 1)
    assert_same(dict(target.encoder.state_dict()), dict(source.encoder.state_dict()))


def shape_of_one(state):
    return {**state, "encoder.0.weight": torch.zeros(5, 2)}


def one_missing(state):
    return {name: tensor for name, tensor in state.items() if name != "encoder.1.bias"}


def one_more(state):
    return {**state, "encoder.2.weight": torch.zeros(1)}


def prefixed(state):
    return {f"model.{name}": tensor for name, tensor in state.items()}


def without_encoder(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("encoder")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shape_of_one, r"encoder\.0\.weight is \(5, 2\) there and \(3, 2\) here"),
        (one_missing, r"encoder\.1\.bias is absent there and \(1,\) here"),
        (one_more, r"encoder\.2\.weight is \(1,\) there and absent here"),
        (prefixed, r"tensor model\.encoder\.0\.weight belongs to none of encoder, head, projector"),
        (without_encoder, r"encoder\.0\.weight is absent there"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(change, message):
    target = Parts()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_part(target.encoder, change(Parts().state_dict()), "encoder", "x.ckpt")
    assert_same(dict(target.state_dict()), before)
