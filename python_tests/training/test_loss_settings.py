"""Losses of pre-training by their names, from the command line and from YAML files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from training_help import assert_same, checkpoint, mmfast, train

from mmfast.training.config import Config
from mmfast.training.module import StageModule
from mmfast.training.parsing import config_of, load_yaml
from mmfast.training.seen import Seen

CLASSES = ["--data.synthetic.task=classification", "--data.synthetic.labelled=0.9"]
LOSSES = {
    "nt_xent": ["--loss.name=nt_xent", "--loss.options.temperature=0.2"],
    "info_nce": ["--loss.name=info_nce"],
    "clip": ["--loss.name=clip", "--loss.options={learnable: true}"],
    "siglip": ["--loss.name=siglip", "--loss.options.bias=-5"],
    "sup_con": ["--loss.name=sup_con"],
    "ser": ["--loss.name=nt_xent", "--loss.labels=true", "--loss.options.variant=ser"],
}
# Semi-hard for 80 % of three epochs: the last one is hard.
LOSSES["triplet_margin"] = ["--loss.name=triplet_margin", "--loss.options.mining=semihard_then_hard"]
LOSSES["smooth_triplet"] = ["--loss.name=smooth_triplet"]
LOSSES["vicreg"] = ["--loss.name=vicreg", "--loss.options.covariance=2"]
FASTER = ["--pretraining.lr=0.01", "--pretraining.epochs=3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {name: train("pretrain", root / name, *CLASSES, *FASTER, *words) for name, words in LOSSES.items()}


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_learns(name, runs):
    history = result(runs[name])["history"]
    losses = [epoch["train_loss"] for epoch in history]
    assert losses[-1] < losses[0] or name == "triplet_margin"  # of which another part is mined at the end
    if name == "vicreg":
        assert history[-1]["train_covariance"] > 0 and "train_mean_cosine" not in history[0]
    else:
        assert all(-1 <= epoch["train_mean_cosine"] <= 1 for epoch in history)
    assert "train_mean_diagonal" not in history[0] and "valid_effective_rank" in history[0]
    positives = {"nt_xent": 1.0}.get(name)
    if name in ("sup_con", "ser"):
        assert all(epoch["train_positives"] > 1 for epoch in history)
    else:
        assert history[0].get("train_positives") == positives


class Died(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("name", ["clip", "siglip", "triplet_margin"])
def test_a_file_says_the_same_as_flags_and_a_stopped_run_ends_as_one_that_was_not(
    name, runs, tmp_path, monkeypatch
):
    written = load_yaml(runs[name] / "config.yaml")
    given = {"loss": {"name": written["loss"]["name"], "options": written["loss"]["options"]}}
    (tmp_path / "loss.yaml").write_text(yaml.safe_dump(given))
    words = [*CLASSES, *FASTER, f"--config={tmp_path / 'loss.yaml'}"]
    step = StageModule.training_step

    def deadly(self, batch, batch_idx):
        if self.global_step == 5:
            raise Died
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", deadly)
        with pytest.raises(Died):
            train("pretrain", tmp_path / "run", *words)
    train("pretrain", tmp_path / "run", *words, "--resume")
    one, other = (checkpoint(folder / "last.ckpt") for folder in (tmp_path / "run", runs[name]))
    for key in ("state_dict", "optimizer_states", "epoch", "global_step"):
        assert_same(one[key], other[key], key)
    assert result(tmp_path / "run")["history"] == result(runs[name])["history"]
    scales = [key for key in one["state_dict"] if key.startswith("loss.")]
    assert scales == {"clip": ["loss.log_scale"], "siglip": ["loss.log_scale", "loss.bias"]}.get(name, [])


def test_by_classes_labelled_samples_alone_are_trained_on_and_known_as_such(runs):
    assert result(runs["sup_con"])["samples"]["inputs"] < result(runs["nt_xent"])["samples"]["inputs"] == 57
    for name, empty in (("sup_con", "inputs"), ("nt_xent", "labels")):
        record = checkpoint(runs[name] / "last.ckpt")["mmfast"]
        sizes = {use: len(found) for use, found in Seen(**record["seen"])._asdict().items()}
        other = {"inputs": "labels", "labels": "inputs"}[empty]
        assert sizes[empty] == 0 and sizes[other] == result(runs[name])["samples"]["inputs"]


def test_what_pre_training_by_classes_made_is_tuned_exported_and_embedded(runs, tmp_path):
    pretrained = runs["sup_con"] / "last.ckpt"
    train("finetune", tmp_path / "ft", f"--from={pretrained}", "--supervised.epochs=1")
    assert mmfast("embed", pretrained, f"--out={tmp_path / 'e.npz'}") == 0
    assert mmfast("export", runs["siglip"] / "last.ckpt", f"--out={tmp_path / 'e.safetensors'}") == 0


def test_the_line_at_the_end_tells_of_the_loss(tmp_path, capsys):
    train("pretrain", tmp_path / "bf16", *FASTER, "--run.precision=bf16-mixed", *LOSSES["siglip"])
    assert "mean cosine of the two views 0." in capsys.readouterr().out
    train("pretrain", tmp_path / "barlow", "--pretraining.epochs=1")
    out = capsys.readouterr().out
    assert "mean diagonal" in out and "cosine" not in out


def test_files_and_checkpoints_from_before_there_was_a_choice_say_the_same():
    old = {"loss": {"name": "barlow_twins", "lambd": 0.02, "center": False, "options": {"variant": "thesis"}}}
    config = config_of(old)
    assert config.loss.lambd == 0.02 and config.loss.labels is None and config.loss.name == "barlow_twins"
    assert Config().loss.name == "barlow_twins" and Config().loss.options == {}


REFUSED = {
    "must be one of barlow_twins, vicreg, nt_xent, info_nce, clip, siglip": ["--loss.name=sigclip"],
    "did you mean siglip?": ["--loss.name=sigclip"],
    "loss.options must fit the loss barlow_twins: there is no temperature among lambd": [
        "--loss.options.temperature=0.1"
    ],
    "there is no scale among temperature, normalise, got 2": [
        "--loss.name=info_nce",
        "--loss.options={scale: 2}",
    ],
    "loss.options.temperature must be positive, got 0": ["--loss.name=clip", "--loss.options.temperature=0"],
    "loss.options.temperature must be a number, got 'warm'": [
        "--loss.name=clip",
        "--loss.options.temperature=warm",
    ],
    "loss.options must fit the loss sup_con: sup_con: variant must be one of out, in, solo, hobbit, got 'inn'": [
        "--loss.name=sup_con",
        "--loss.options.variant=inn",
        "--data.synthetic.task=classification",
    ],
    "loss.options.margin must be finite and at least 0, got -1": [
        "--loss.name=triplet_margin",
        "--loss.options.margin=-1",
    ],
    "loss.options must fit the loss triplet_margin: triplet_margin: soft must be False unless": [
        "--loss.name=triplet_margin",
        "--loss.options.soft=true",
        "--data.synthetic.task=classification",
    ],
    "loss.lambd must be left at 0.005, for the loss nt_xent has none, got 0.1": [
        "--loss.name=nt_xent",
        "--loss.lambd=0.1",
    ],
    "loss.center must be left at true, for the loss clip has none, got false": [
        "--loss.name=clip",
        "--loss.center=false",
    ],
    "loss.labels must be false for the loss barlow_twins, or left out, got True": ["--loss.labels=true"],
    "loss.labels must be true for the loss sup_con, or left out, got False": [
        "--loss.name=sup_con",
        "--loss.labels=false",
    ],
    "loss.name sup_con must have samples of one class each to go by labels, the data have regression": [
        "--loss.name=sup_con"
    ],
    "the data have multilabel of": [
        "--loss.name=nt_xent",
        "--loss.labels=true",
        "--data.synthetic.task=multilabel",
    ],
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_a_loss_does_not_take_is_refused_in_a_sentence(sentence, tmp_path, capsys):
    words = ["--run.accelerator=cpu", "--data.synthetic.samples=80", "--data.synthetic.max_length=6"]
    assert mmfast("pretrain", *words, f"--run.folder={tmp_path / 'r'}", *REFUSED[sentence]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1, error
    assert not (tmp_path / "r").exists()


def test_an_experiment_reports_a_loss_by_classes(tmp_path):
    words = ["--experiment.methods=[LE]", "--experiment.seeds=[0]", "--experiment.workers=1"]
    words += ["--pretraining.epochs=1", "--supervised.epochs=1", "--experiment.baselines=false"]
    train("experiment", tmp_path / "e", *CLASSES, *LOSSES["sup_con"], *words)
    assert (tmp_path / "e/plots/pretraining.png").exists() and not list(tmp_path.rglob("correlation.png"))
    assert "sup_con" in (tmp_path / "e/config.yaml").read_text()
