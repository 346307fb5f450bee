"""Settings: defaults, files, rules, chains of augmentations."""

from __future__ import annotations

import inspect

import pytest
import torch

from mmfast import BarlowTwinsLoss
from mmfast.cli.presets import PRESETS
from mmfast.errors import UserError
from mmfast.training.augmentation import make_views
from mmfast.training.config import (
    AugmentationConfig,
    Config,
    ExperimentConfig,
    check,
    check_experiment,
    differences,
)
from mmfast.training.parsing import config_of, load_yaml, save_yaml
from mmfast.training.seeds import derive
from mmfast.transforms import FeatureMask, GaussianNoise, SeqAug, TimeMask

MODALITIES = ("text", "audio", "visual")
# Thesis table 8.3.2.
CHAINS = [
    "noise",
    "noise+seqaug",
    "noise+masking",
    "noise+seqaug+masking",
    "masking",
    "masking+noise",
    "seqaug",
    "seqaug+noise",
    "seqaug+masking",
    "seqaug+noise+masking",
    "seqaug+masking+noise",
]
TRANSFORMS = {"noise": GaussianNoise, "masking": TimeMask, "seqaug": SeqAug, "feature_masking": FeatureMask}


def test_defaults_are_those_of_the_thesis():
    config = Config()
    assert (config.pretraining.batch_size, config.pretraining.epochs, config.pretraining.lr) == (
        170,
        20,
        1e-3,
    )
    assert (config.supervised.batch_size, config.supervised.epochs, config.supervised.lr) == (32, 100, 3e-4)
    assert (
        config.supervised.patience,
        config.supervised.plateau_patience,
        config.supervised.plateau_factor,
    ) == (10, 2, 0.5)
    assert (config.model.hidden, config.model.dropout, config.model.bidirectional) == (100, 0.2, False)
    assert config.model.projector == [1000, 1000, 1000]
    assert (config.loss.lambd, config.augmentation.preset) == (5e-3, "masking")
    check(config)


def test_yaml_round_trip(tmp_path):
    config = Config()
    config.augmentation.view_a = [{"name": "masking", "p": 0.6, "q": 0.7}]
    config.data.synthetic.features = {"text": 8}
    config.model.bidirectional = "fusion"
    save_yaml(tmp_path / "config.yaml", config)
    assert config_of(load_yaml(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("data", "label_share", 0.0),
        ("data", "label_share", 1.1),
        ("data", "folds", 1),
        ("pretraining", "batch_size", 1),
        ("pretraining", "lr", 0.0),
        ("supervised", "patience", 0),
        ("supervised", "plateau_factor", 1.0),
        ("run", "seed", 2**64),
        ("run", "threads", 0),
    ],
)
def test_settings_out_of_range_are_named(section, name, value):
    config = Config()
    setattr(getattr(config, section), name, value)
    with pytest.raises(UserError, match=rf"config: {section}\.{name} must be .*, got {value}"):
        check(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("methods", []),
        ("methods", ["FS", "FS"]),
        ("seeds", [2**64]),
        ("seeds", [-1, 2**64 - 1]),
        ("workers", 0),
    ],
)
def test_experiment_settings_out_of_range_are_named(name, value):
    with pytest.raises(UserError, match=rf"experiment\.{name} must be"):
        check_experiment(ExperimentConfig(**{name: value}))


@pytest.mark.parametrize(
    "values", [{"data": {"pth": "x"}}, {"supervised": {"lr": "fast"}}, {"model": {"bidirectional": "x"}}]
)
def test_unknown_keys_and_wrong_types_are_one_sentence(values):
    with pytest.raises(UserError, match="config: ") as error:
        config_of(values)
    assert "\n" not in str(error.value)


def test_differences_descend_and_ignore():
    ours = {"a": 1, "b": {"c": [1, 2], "d": 3}}
    assert not [*differences(ours, {"a": 1, "b": {"c": [1, 2], "d": 3}})]
    theirs = {"a": 1, "b": {"c": [1], "d": 4}}
    assert [*differences(ours, theirs)] == [("b.c", [1, 2], [1]), ("b.d", 3, 4)]
    assert [*differences(ours, theirs, ignore=("b.c",))] == [("b.d", 3, 4)]
    assert [*differences(ours, {**ours, "e": 0})] == [("e", None, 0)]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset):
    settings = dict(PRESETS[preset].settings)
    check_experiment(ExperimentConfig(**settings.pop("experiment", {})))
    check(config_of(settings))


def test_the_small_preset_pretrains_long_enough_on_hundreds_of_samples():
    settings = config_of({"pretraining": PRESETS["small"].settings["pretraining"]}).pretraining
    # Inputs of pre-training in each of five folds of ICT-MMMO; the incomplete batch is dropped.
    assert 297 // settings.batch_size * settings.epochs >= 150


def test_preset_thesis_is_what_the_thesis_prints():
    """Sections 7.1 to 7.3, M3's pooling; everything else printed there is a default."""
    settings = dict(PRESETS["thesis"].settings)
    assert ExperimentConfig(**settings.pop("experiment")).seeds == [0, 1, 2, 3, 4]
    config = config_of(settings)
    assert (config.loss.lambd, config.pretraining.lr, config.model.pooling) == (2e-2, 3e-6, "sum")
    config.loss.lambd, config.pretraining.lr, config.model.pooling = 5e-3, 1e-3, "mean"
    assert config == Config()


def test_defaults_are_the_same_in_python_and_on_the_command_line():
    assert Config().loss.lambd == BarlowTwinsLoss().lambd
    assert Config().loss.center is inspect.signature(BarlowTwinsLoss).parameters["center"].default


@pytest.mark.parametrize("chain", CHAINS)
def test_chains_of_table_8_3_2(chain):
    views = make_views(AugmentationConfig(preset=chain), MODALITIES)
    for steps in (views.chain_a.transforms, views.chain_b.transforms):
        assert [type(step) for step in steps] == [TRANSFORMS[name] for name in chain.split("+")]


def test_preset_values_of_table_8_2_1():
    views = make_views(AugmentationConfig(preset="noise+seqaug+masking"), MODALITIES)
    (noise_a, seqaug, masking), (noise_b, *_) = views.chain_a.transforms, views.chain_b.transforms
    assert (noise_a.p, noise_b.p, noise_a.mu, noise_a.sigma) == (0.9, 0.1, 0.0, 0.1)
    assert (seqaug.p, seqaug.alpha) == (0.5, {"text": 0.15, "audio": 0.10, "visual": 0.20})
    assert (masking.p, masking.q) == (0.6, 0.7)


def test_steps_replace_the_preset_in_their_view_and_take_apply():
    config = AugmentationConfig(
        view_a=[{"name": "noise", "sigma": 0.5}, {"name": "masking", "apply": "batch"}], apply="sample"
    )
    views = make_views(config, MODALITIES)
    noise, masking = views.chain_a.transforms
    assert (noise.sigma, noise.apply_to, masking.apply_to) == (0.5, "sample", "batch")
    assert [type(step) for step in views.chain_b.transforms] == [TimeMask]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            AugmentationConfig(preset="blur"),
            "augmentation.preset: a step must be one of noise, .* got 'blur'",
        ),
        (AugmentationConfig(view_a=[{"p": 1}]), "augmentation.view_a: each step needs a name"),
        (
            AugmentationConfig(view_b=[{"name": "noise", "q": 1}]),
            "augmentation.view_b: noise has no 'q', it takes sigma",
        ),
        (
            AugmentationConfig(view_a=[{"name": "seqaug", "alpha": 1.5}]),
            r"alpha must be in \[0, 1\], got 1.5",
        ),
    ],
)
def test_wrong_chains_are_one_sentence(config, message):
    with pytest.raises(UserError, match=message):
        make_views(config, MODALITIES)


def test_preset_without_alpha_for_a_modality_says_so():
    with pytest.raises(UserError, match="no alpha for the modality 'pose'"):
        make_views(AugmentationConfig(preset="seqaug"), ("text", "pose"))


def test_seeds_differ_by_purpose_seed_and_step():
    seeds = {derive(s, purpose, i) for s in range(20) for purpose in "ab" for i in range(20)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(max(seeds))
    # Known answer: changing the rule would silently change every published result.
    assert derive(0, "views", 1) == 9002077003676654966
