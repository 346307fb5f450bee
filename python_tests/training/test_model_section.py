"""``model.encoder``: a user's class becomes a section of settings, or is refused in one sentence."""

from __future__ import annotations

import inspect
import json
from dataclasses import MISSING, asdict, fields
from typing import Any, Literal, get_type_hints

import pytest
from training_help import TINY, mmfast

from mmfast.data import MultimodalData, MultimodalDataset, save, synthetic
from mmfast.errors import UserError
from mmfast.models import M3Encoder
from mmfast.training.config import Config, ModelConfig
from mmfast.training.encoder import make_encoder
from mmfast.training.model_section import config_type, own_settings
from mmfast.training.parsing import config_of, load_yaml, save_yaml

SMALL = [flag for flag in TINY if not flag.startswith("--model.hidden")]
FEATURES = {"text": 8, "audio": 6, "visual": 4}


def described(kind: type) -> dict[str, tuple[Any, Any]]:
    """Setting of a model section -> type and default, those that all have apart."""
    hints = get_type_hints(kind)
    return {
        f.name: (hints[f.name], f.default if f.default_factory is MISSING else f.default_factory())
        for f in fields(kind)
        if f.name not in ("encoder", "projector")
    }


def test_the_description_of_m3_that_needs_no_torch_is_its_signature():
    hints = get_type_hints(M3Encoder.__init__)
    parameters = inspect.signature(M3Encoder).parameters
    signature = {n: (hints[n], p.default) for n, p in parameters.items() if n != "features"}
    assert described(ModelConfig) == signature
    assert described(get_type_hints(config_type("mmfast.models.M3Encoder"))["model"]) == signature
    assert config_type("M3Encoder") is Config


def test_a_class_is_described_by_its_signature_and_that_of_its_base():
    pooled = {
        "width": (int, 8),
        "kernel": (list[int], [1, 2]),
        "scale": (float | None, None),
        "extra": (Any, None),
    }
    assert described(get_type_hints(config_type("own_encoders.Pooled"))["model"]) == pooled
    assert described(get_type_hints(config_type("own_encoders.Deep"))["model"]) == (
        {"depth": (int, MISSING)} | pooled
    )


def test_annotations_that_settings_cannot_have_take_anything():
    assert described(get_type_hints(config_type("own_encoders.Loose"))["model"]) == {
        "sizes": (list[int], []),
        "path": (Any, None),
        "table": (dict[str, list[int]] | None, None),
        "mode": (Literal["a", "b"], "a"),
        "later": (Any, 3),
    }


def test_settings_reach_the_class_and_come_back_from_files(tmp_path):
    model = {"encoder": "own_encoders.Deep", "depth": 2, "width": 5, "kernel": [3, 4], "extra": {"a": [1]}}
    config = config_of({"model": model})
    save_yaml(tmp_path / "config.yaml", config)
    assert config_of(load_yaml(tmp_path / "config.yaml")) == config
    assert isinstance(config, Config) and config.model.projector == Config().model.projector
    assert own_settings(config.model) == {
        "depth": 2,
        "width": 5,
        "kernel": (3, 4),
        "scale": None,
        "extra": {"a": [1]},
    }
    encoder = make_encoder(config.model, FEATURES)
    assert (len(encoder.more), encoder.out_features, encoder.kernel) == (2, 15, (3, 4))
    assert encoder.extra == {"a": [1]} and asdict(config.model)["encoder"] == "own_encoders.Deep"


def test_flags_files_and_presets_know_the_arguments_of_the_class(tmp_path, capsys):
    from mmfast.cli.arguments import pretrain

    (tmp_path / "a.yaml").write_text("model: {encoder: own_encoders.Pooled, width: 3, scale: 0.5}\n")
    (tmp_path / "model.yaml").write_text("{encoder: own_encoders.Pooled, width: 3, scale: 0.5}\n")
    for argv in (
        [f"--config={tmp_path / 'a.yaml'}"],
        ["--model", str(tmp_path / "model.yaml")],
        ["--model={encoder: own_encoders.Pooled, scale: 0.5}"],
    ):
        model = pretrain([*argv, "--model.width", "4", "--preset=demo"]).settings.model
        # Of a preset's model, which is M3, only the projector is for all.
        assert (model.width, model.scale, model.projector) == (4, 0.5, [128, 128, 128])
    with pytest.raises(SystemExit):
        pretrain(["--model.encoder", "own_encoders.Deep", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--model.width WIDTH Size of each modality's vector. (type: int, default: 8)" in said
    assert "--model.depth DEPTH How deep it is. (required, type: int)" in said
    assert "Two numbers: neither is used, not to 50 %." in said
    assert "--model.hidden" not in said and "--model.activation" not in said


# Class -> what the sentence holds. All that is known before the data, ...
NAMES = {
    "own_encoders.Poled": "got own_encoders.Poled: own_encoders has no Poled; did you mean Pooled?",
    "own_encodes.Pooled": "own_encodes.Pooled: there is no module own_encodes in ",
    "own_encoders.sub.Pooled": "there is no module own_encoders.sub in ",
    "M3Encodr": "one of M3Encoder, or an import path such as my.module.MyEncoder, got M3Encodr; did you mean M3",
    "own/encoders.py": "must be an import path such as my.module.MyEncoder, got own/encoders.py",
    ".Pooled": "must be an import path such as my.module.MyEncoder, got .Pooled",
    "own_encoders.Other": "a subclass of mmfast.models.Encoder, got own_encoders.Other, a class",
    "own_encoders.function": "a subclass of mmfast.models.Encoder, got own_encoders.function, a function",
    "own_encoders.NoFuse": "a class with encode and fuse, got own_encoders.NoFuse, which has no fuse",
    "own_encoders.Reserved": "a class without an argument projector",
    "own_encoders.Featureless": "whose constructor takes features, a dict modality -> size, got own_encoders.Feat",
    "broken_import.A": "broken_import raises ZeroDivisionError: division by zero (broken_import.py, line 2)",
    "broken_syntax.A": "broken_syntax raises SyntaxError: invalid syntax (broken_syntax.py, line 1)",
    "broken_name.A": "got broken_name.A: broken_name raises ModuleNotFoundError: No module named 'not_installed'",
    "broken_exit.A": "got broken_exit.A: broken_exit raises SystemExit: 0",
}
# ... and what shows when it is built and tried.
BUILT = {
    "own_encoders.Sizeless": "a class that sets out_features to a positive integer, got own_encoders.Sizeless: 2.5",
    "own_encoders.Wide": "whose fuse returns (B, out_features), here (2, 24), got own_encoders.Wide: float32 of the "
    "shape (2, 1, 24)",
    "own_encoders.Listed": "whose encode returns a dict of its modalities, got own_encoders.Listed: list",
    "own_encoders.Joined": "differ in length, got own_encoders.Joined: it raises RuntimeError: Sizes",
    "own_encoders.Broken": "a class that can be built by its arguments, got own_encoders.Broken: it raises "
    "ZeroDivisionError: float division by zero (own_encoders.py, line ",
    "own_encoders.Pair": "Pair: features must name 2 modalities, got text, audio, visual",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with modules that cannot be imported."""
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "broken_import": "x = 1\n1 / 0\n",
        "broken_syntax": "class A(:\n",
        "broken_name": "import not_installed\n",
        "broken_exit": "raise SystemExit(0)\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def refusal(capsys, *arguments) -> str:
    assert mmfast(*arguments, "--run.folder=run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("encoder", NAMES | BUILT)
def test_a_class_that_does_not_fit_is_one_sentence(encoder, here, capsys):
    line = refusal(capsys, "pretrain", *SMALL, "--model.encoder", encoder)
    assert (NAMES | BUILT)[encoder] in line
    if encoder in BUILT:
        for command in ("finetune", "experiment"):
            assert refusal(capsys, command, *SMALL, "--model.encoder", encoder) == line
    assert not (here / "run").exists()


ARGUMENTS = {
    "--model.widht=3": "there is no --model.widht; did you mean --model.width?",
    "--model.hidden=3": "there is no --model.hidden",
    "--model.activation=ReLU": "there is no --model.activation",
    "--model.width=wide": "--model.width must be a whole number, got 'wide'",
    "--model.kernel=3": "--model.kernel must be a list of whole numbers such as [1, 2], got '3'",
    "--model={depth: 3, wdth: 4}": "--model: there is no setting model.wdth; did you mean model.width?",
    "--model={encoder: own_encoders.Pooled}": "model.encoder must be the same wherever it is given",
    "--model.width=1000000": "must leave the weights, gradients and Adam's moments within the free memory of",
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_arguments_that_the_class_does_not_take_are_one_sentence(argument, here, capsys):
    line = refusal(
        capsys, "pretrain", *SMALL, "--model.encoder=own_encoders.Deep", "--model.depth=1", argument
    )
    assert ARGUMENTS[argument] in line and not (here / "run").exists()


def test_an_argument_without_default_must_be_given(here, capsys):
    sentence = "model.depth must be given, a whole number: it has no default"
    assert sentence in refusal(capsys, "pretrain", *SMALL, "--model.encoder=own_encoders.Deep")
    with pytest.raises(UserError, match=sentence):
        config_of({"model": {"encoder": "own_encoders.Deep"}})


def test_a_batch_that_the_encoder_cannot_take_is_refused_before_anything_runs(here, capsys):
    values = {"text": [[[float(i)]] * (70 if i % 3 == 0 else 3) for i in range(15)]}
    save(
        MultimodalData(train=MultimodalDataset(values, [float(i % 3) for i in range(15)])), here / "long.npz"
    )
    arguments = ["--data.path=long.npz", "--data.split=[0.6, 0.2, 0.2]", "--supervised.batch_size=8"]
    for encoder, sentence in (
        (
            "Short",
            "a batch of 1 with 70 time steps, got Short: it raises IndexError: place 64 of 64 (own_encoders",
        ),
        (
            "Normed",
            "a batch of 1 with 70 time steps, got Normed: it raises ValueError: Expected more than 1 value",
        ),
    ):
        line = refusal(capsys, "finetune", *SMALL, *arguments, f"--model.encoder=own_encoders.{encoder}")
        assert sentence in line and not (here / "run").exists()


def test_an_encoder_for_short_sequences_takes_short_ones(here, capsys):
    few = [*SMALL, "--model.encoder=own_encoders.Short", "--pretraining.epochs=1"]
    line = refusal(capsys, "pretrain", *few, "--model.places=3")
    assert "got own_encoders.Short: it raises IndexError: place 3 of 3" in line
    assert mmfast("pretrain", *few, "--model.places=9", "--run.folder=run") == 0


@pytest.mark.parametrize("name", ["Normed", "Plain"])
def test_building_an_encoder_leaves_no_trace_on_it(name):
    import torch

    config = config_of({"model": {"encoder": f"own_encoders.{name}"}})
    torch.manual_seed(3)
    encoder = make_encoder(config.model, FEATURES)
    torch.manual_seed(3)
    plain = type(encoder)(FEATURES)
    assert encoder.training
    for key, value in plain.state_dict().items():
        assert torch.equal(encoder.state_dict()[key], value), key


def unaligned(data: MultimodalDataset) -> MultimodalDataset:
    """The same with twice the steps of audio."""
    samples = [data[i] for i in range(len(data))]
    values = {m: [s.values[m] for s in samples] for m in data.modalities}
    values["audio"] = [x.repeat_interleave(2, 0) for x in values["audio"]]
    return MultimodalDataset(values, data.labels, names=data.names, ids=data.ids)


def test_unaligned_data_are_for_encoders_that_take_them(here, capsys):
    data = synthetic(80, max_length=6, features=FEATURES)
    parts = {name: unaligned(getattr(data, name)) for name in ("train", "valid", "test")}
    save(MultimodalData(**parts), here / "data.npz")
    chain = "--augmentation.preset=noise+seqaug+masking+feature_masking"
    arguments = [*SMALL, "--data.path=data.npz", chain, "--pretraining.epochs=1", "--supervised.epochs=1"]
    for encoder in ("M3Encoder", "own_encoders.Aligned"):
        for command in ("pretrain", "finetune"):
            line = refusal(capsys, command, *arguments, f"--model.encoder={encoder}")
            assert "align the modalities first" in line and not (here / "run").exists()
    # 57 samples leave no batch of one, for this encoder has batch normalisation.
    arguments += ["--model.encoder=own_encoders.Normed", "--supervised.batch_size=9"]
    assert mmfast("pretrain", *arguments, "--run.folder=pre") == 0
    assert mmfast("finetune", *arguments, "--from=pre/last.ckpt", "--run.folder=fine") == 0
    assert mmfast("evaluate", "fine/best.ckpt") == 0
    assert mmfast("embed", "fine/best.ckpt", "--out=z.npz") == 0
    flags = [
        "--run.folder=all",
        "--experiment.seeds=[0]",
        "--experiment.workers=1",
        "--experiment.methods=[FS, LE]",
    ]
    assert mmfast("experiment", *arguments, *flags) == 0, capsys.readouterr().err


def test_an_encoder_without_parameters_has_a_head_that_learns(here):
    arguments = [
        *SMALL,
        "--model.encoder=own_encoders.Plain",
        "--supervised.epochs=1",
        "--pretraining.epochs=1",
    ]
    assert mmfast("finetune", *arguments, "--run.folder=a") == 0
    assert mmfast("finetune", *arguments, "--freeze=true", "--run.folder=b") == 0
    assert mmfast("pretrain", *arguments, "--run.folder=c") == 0


def test_a_checkpoint_says_which_encoder_it_is_of(here, capsys):
    arguments = [*SMALL, "--pretraining.epochs=1", "--supervised.epochs=1"]
    mine = ["--model.encoder=own_encoders.Deep", "--model.depth=2", "--model.width=4"]
    assert mmfast("pretrain", *arguments, *mine, "--run.folder=pre") == 0
    for more in ([], ["--model.width=4"], ["--model", "{depth: 2}"]):
        folder = f"fine{len(more)}{more}"
        assert mmfast("finetune", *arguments, "--from=pre/last.ckpt", *more, f"--run.folder={folder}") == 0
        model = load_yaml(f"{folder}/config.yaml")["model"]
        assert (model["encoder"], model["depth"], model["width"]) == ("own_encoders.Deep", 2, 4)
    capsys.readouterr()
    for more, sentence in (
        (["--model.widht=5"], "there is no --model.widht; did you mean --model.width?"),
        (
            ["--model.width=5"],
            "another architecture, encoder.layers.text.weight is (4, 8) there and (5, 8) here",
        ),
        (["--model.encoder=M3Encoder", "--model.hidden=4"], "its encoder is of another architecture"),
    ):
        assert sentence in refusal(capsys, "finetune", *arguments, "--from=pre/last.ckpt", *more)
        assert not (here / "run").exists()


METHOD = """
model: {{encoder: own_encoders.{0}, width: 4}}
stages:
  - {{name: views, objectives: {{many_views: 1, auxiliary: 0.1}}, epochs: 1}}
  - {{name: labels, objectives: {{supervised: 1, auxiliary: 0.1}}, epochs: 1}}
"""


def test_stages_train_on_vectors_and_terms_of_the_class(here, capsys):
    for name in ("Convolved", "Vectorless"):
        (here / f"{name}.yaml").write_text(METHOD.format(name))
    assert mmfast("train", "Convolved.yaml", *SMALL, "--run.folder=method") == 0, capsys.readouterr().err
    history = json.loads((here / "method/labels/result.json").read_text())["history"]
    assert history[0]["train_auxiliary_size"] > 0
    assert load_yaml("method/config.yaml")["model"]["width"] == 4
    line = refusal(capsys, "train", "Vectorless.yaml", *SMALL)
    assert (
        "(B, H) for each modality, here (2, H), got Vectorless: float32 of the shape (2, 64, 4) for text"
        in line
    )
    assert not (here / "run").exists()
    with pytest.raises(SystemExit):
        mmfast("train", "--model.encoder", "own_encoders.Deep", "--help")
    assert "--model.depth" in capsys.readouterr().out
