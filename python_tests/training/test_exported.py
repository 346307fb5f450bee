"""Exported weights: the same numbers, usable without the run, and nothing runs when they are read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_encoders import Pooled
from training_help import TINY, checkpoint, mmfast, train

from mmfast import UserError
from mmfast.data import collate, synthetic
from mmfast.training import embed, export, load_encoder, runs
from mmfast.training.predictions import predict
from mmfast.training.restored import restore

safetensors = pytest.importorskip("safetensors.torch")
FEATURES = {"text": 8, "audio": 6, "visual": 4}
OWN = "own_encoders.Pooled"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Runs of both kinds, one of a class of one's own, and what is exported of them."""
    folder = tmp_path_factory.mktemp("exported")
    train("pretrain", folder / "pre", "--pretraining.epochs=1")
    train("finetune", folder / "fine", "--supervised.epochs=1")
    for kind, name in (("pre", "last"), ("fine", "best")):
        assert mmfast("export", folder / kind / f"{name}.ckpt", "--out", folder / f"{kind}.safetensors") == 0
    return folder


def batch():
    data = synthetic(80, labelled=0.5, max_length=6, features=FEATURES)
    return collate([data.test[i] for i in range(len(data.test))])


@pytest.mark.parametrize("kind", ["pre", "fine"])
def test_tensors_are_those_of_the_checkpoint(kind, made):
    state = checkpoint(made / kind / ("last.ckpt" if kind == "pre" else "best.ckpt"))["state_dict"]
    found = safetensors.load_file(made / f"{kind}.safetensors")
    part = "projector" if kind == "pre" else "head"
    assert found.keys() == {n for n in state if n.startswith(("encoder.", f"{part}."))} and len(found) > 10
    loaded = load_encoder(made / f"{kind}.safetensors")
    assert not loaded.training and (loaded.head is None) == (loaded.task is None) == (kind == "pre")
    own = loaded.state_dict()
    assert own.keys() == found.keys()
    for name, tensor in found.items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name])
        assert torch.equal(own[name], state[name])


def test_vectors_and_predictions_are_those_of_the_run(made):
    loaded = load_encoder(made / "fine.safetensors")
    with torch.no_grad():
        fused, predictions = loaded(batch()), loaded.predict(batch())
    torch.testing.assert_close(
        fused, embed(made / "fine/best.ckpt", split="test").fused, atol=1e-6, rtol=1e-6
    )
    module, dataset, *_ = restore(str(made / "fine/best.ckpt"), None, "test")
    torch.testing.assert_close(predictions, predict(module, dataset), atol=1e-6, rtol=1e-6)
    assert loaded.task == module.task
    with pytest.raises(UserError, match="there must be a head"):
        load_encoder(made / "pre.safetensors").predict(batch())


def test_standardisation_comes_back_bit_by_bit(made):
    _, record = runs.restore_encoder(made / "fine/best.ckpt")
    found = load_encoder(made / "fine.safetensors").standardiser.state_dict()
    for modality, state in record["standardiser"].items():
        for key, value in state.items():
            own = found[modality][key]
            same = torch.equal(own, value) if key in ("mean", "scale") else own == value
            assert same, (modality, key)


def test_files_tell_nothing_of_the_run(made):
    with safetensors.safe_open(made / "fine.safetensors", "pt") as file:
        about = file.metadata()
    assert about.keys() == {"mmfast"} and str(made) not in about["mmfast"]
    assert json.loads(about["mmfast"]).keys() == {"format", "model", "features", "standardiser", "task"}


def test_a_class_of_ones_own_is_imported_when_the_caller_names_it(tmp_path):
    tiny = [flag for flag in TINY if not flag.startswith("--model.hidden")]
    flags = (f"--model.encoder={OWN}", "--supervised.epochs=1", f"--run.folder={tmp_path / 'run'}")
    assert mmfast("finetune", *tiny, *flags) == 0
    export(tmp_path / "run/best.ckpt", tmp_path / "own.safetensors")
    with pytest.raises(
        UserError, match=f'of the class {OWN}: load_encoder.path, encoder="{OWN}". imports it'
    ):
        load_encoder(tmp_path / "own.safetensors")
    with pytest.raises(UserError, match=f"of the class {OWN}: got os.path"):
        load_encoder(tmp_path / "own.safetensors", encoder="os.path")
    loaded = load_encoder(tmp_path / "own.safetensors", encoder=OWN)
    assert isinstance(loaded.encoder, Pooled)
    with torch.no_grad():
        assert torch.isfinite(loaded(batch())).all()


def rewritten(source: Path, target: Path, change) -> Path:
    with safetensors.safe_open(source, "pt") as file:
        network = json.loads(file.metadata()["mmfast"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(network, tensors)
    safetensors.save_file(tensors, target, {"mmfast": json.dumps(network)})
    return target


CHANGES = {
    "a class that is elsewhere": (
        lambda n, t: n["model"].update(encoder="antigravity.Encoder"),
        "the class anti",
    ),
    "no such class": (lambda n, t: n["model"].update(encoder="Nothing"), "model.encoder must be one of"),
    "no features": (lambda n, t: n.pop("features"), "its description is damaged .KeyError"),
    "features": (
        lambda n, t: n.update(features={"text": "many"}),
        "its description is damaged|must be an integer",
    ),
    "a width": (lambda n, t: n["model"].update(hidden=-1), "hidden must be"),
    "a huge width": (lambda n, t: n["model"].update(hidden=10**7), "hidden|memory|architecture"),
    "a setting": (lambda n, t: n["model"].update(colour="red"), "colour"),
    "a tensor less": (
        lambda n, t: t.pop("head.linear.bias"),
        "another architecture, head.linear.bias",
    ),
    "a tensor more": (lambda n, t: t.update({"evil.x": torch.zeros(1)}), "tensor evil.x belongs to none of"),
    "a shape": (lambda n, t: t.update({"head.linear.bias": torch.zeros(7)}), "another architecture"),
    "a task": (lambda n, t: n.update(task=None), "its description is damaged"),
    "a standardiser": (
        lambda n, t: n.update(standardiser={"text": {"mean": ["x"]}}),
        "damaged|standardiser|state",
    ),
    "another version": (lambda n, t: n.update(format="mmfast-weights 2"), "got 'mmfast-weights 2'"),
    "a list": (lambda n, t: n.update(model=[]), "its description is damaged|config"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_descriptions_that_do_not_fit_are_refused(change, made, tmp_path):
    function, message = CHANGES[change]
    path = rewritten(made / "fine.safetensors", tmp_path / "x.safetensors", function)
    with pytest.raises(UserError, match=message) as caught:
        load_encoder(path)
    assert str(path) in str(caught.value) and "antigravity" not in sys.modules


def test_files_that_are_none_are_refused(made, tmp_path):
    content = (made / "fine.safetensors").read_bytes()
    path = tmp_path / "x.safetensors"
    for damaged in (b"", b"hello", content[:-5], content[:40], (2**60).to_bytes(8, "little") + content[8:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a readable safetensors file"):
            load_encoder(path)
    safetensors.save_file({"encoder.x": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="format must be 'mmfast-weights 1', got None"):
        load_encoder(path)
    os.mkfifo(tmp_path / "fifo")
    for name, message in (("nowhere", "no such file"), ("fifo", "got a FIFO"), (".", "got a folder")):
        with pytest.raises(UserError, match=message):
            load_encoder(tmp_path / name)


def test_what_cannot_be_written_is_refused_and_nothing_is_lost(made, tmp_path, capsys):
    best = made / "fine/best.ckpt"
    before = best.read_bytes()
    assert mmfast("export", best, "--out", best) == 2
    assert "out must be another file than the checkpoint" in capsys.readouterr().err
    assert best.read_bytes() == before
    assert mmfast("export", best, "--out", tmp_path) == 2
    assert mmfast("export", tmp_path / "none.ckpt", "--out", tmp_path / "x") == 2
    assert not (tmp_path / "x").exists()
    old = tmp_path / "old.safetensors"
    old.write_bytes(b"old")
    assert mmfast("export", best, "--out", old) == 0
    assert old.read_bytes() == (made / "fine.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.safetensors"]


def test_help_needs_no_torch():
    code = (
        "import sys; from mmfast.cli.main import main\n"
        "try: main(['export', '--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
