"""The configuration of a run: what the command line, the YAML files and the Python interface share.

Defaults are those of the thesis (Poulinakis 2023, sections 7.1 to 7.3) where it is clear, and the documented reading
where it contradicts itself or its code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from operator import attrgetter
from typing import Any, Literal

from mmfast.errors import UserError
from mmfast.training.data_config import DATA_RULES, SEED, DataConfig
from mmfast.training.objectives.losses import check_loss

# Which samples of a data set: a part of it, all of them, or those of them that a network has not seen.
SPLITS = ("train", "valid", "test", "unlabelled", "all", "unseen")


@dataclass
class ModelConfig:
    """The encoder with its arguments, here those of M3, and the projector.

    :func:`mmfast.training.model_section.config_type` makes the same of another encoder's arguments. Those of M3 stand
    here, so that the command line need not import torch to know them.

    Args:
        encoder: ``M3Encoder``, or the import path of a class of your own such as ``my.module.MyEncoder``, whose
            arguments then take the place of those of M3; ``--model.encoder my.module.MyEncoder --help`` lists them.
        hidden: Width H of the recurrent layers and attentions.
        dropout: Dropout of the encoder, in [0, 1).
        bidirectional: ``false`` (thesis text), ``fusion`` (what the thesis code ran: only the last LSTM) or ``true``
            (M3).
        attention: Self-attention after each modality's LSTM.
        pooling: ``mean`` over real steps, their ``sum``, or the ``last`` one. M3 sums, but over sequences padded to
            one length; over true lengths the sum's scale follows the length, and small data sets are learnt badly.
        masking: Probability of M3's modality masking in training of both phases; 0 switches it off.
        masking_mode: Hide one modality at each ``step``, or one for the whole ``sequence``.
        masking_weights: Modality to its chance of being hidden; equal ones when left out.
        projector: Widths of the projector's layers. The last one is the embedding size D.
    """

    encoder: str = "M3Encoder"
    hidden: int = 100
    dropout: float = 0.2
    bidirectional: bool | Literal["fusion"] = False
    attention: bool = True
    pooling: Literal["mean", "sum", "last"] = "mean"
    masking: float = 0.0
    masking_mode: Literal["step", "sequence"] = "step"
    masking_weights: dict[str, float] | None = None
    projector: list[int] = field(default_factory=lambda: [1000, 1000, 1000])


@dataclass
class TaskConfig:
    """What is learnt from labels; each setting belongs to one task and is refused for others.

    Args:
        loss: Of a regression: ``mae``, the default, ``mse`` or ``huber`` (linear beyond an error of 1).
        class_weights: Of a classification: one number for each class, ``balanced`` (the rarer a class among the
            training samples, the more it weighs) or ``none``, the default.
        positive_weights: Of labels: what one that is there weighs against one that is not, one number each,
            ``balanced`` (absent over present) or ``none``, the default.
        threshold: Of labels: probability above which one is predicted, 0.5 by default.
    """

    loss: Literal["mae", "mse", "huber"] | None = None
    class_weights: Literal["none", "balanced"] | list[float] | None = None
    positive_weights: Literal["none", "balanced"] | list[float] | None = None
    threshold: float | None = None


@dataclass
class AugmentationConfig:
    """The two chains of augmentations that make the two views of pre-training.

    They act on standardised inputs: the preset's noise adds a hundredth to the variance of every feature, whatever
    its scale in the data, and what is masked takes the mean of its feature.

    Args:
        preset: Names joined by ``+``, in order: ``noise``, ``masking``, ``seqaug``, ``feature_masking``, such as
            ``seqaug+noise``; values of thesis table 8.2.1. All chains of table 8.3.2 can be written so.
        view_a: Steps of the first view, each a mapping with ``name`` and the transform's arguments, such as
            ``{name: masking, p: 0.6, q: 0.7}``; replaces the preset in this view. Inputs are standardised, so the
            ``sigma`` of ``noise`` is in standard deviations of each feature over the training samples.
        view_b: The same for the second view.
        apply: Who tosses a step's coin: each ``modality`` (thesis text), the whole ``batch`` (thesis code) or each
            ``sample`` and modality.
    """

    preset: str = "masking"
    view_a: list[dict[str, Any]] | None = None
    view_b: list[dict[str, Any]] | None = None
    apply: Literal["modality", "batch", "sample"] = "modality"


@dataclass
class LossConfig:
    """The loss between two views.

    Args:
        name: Which one: ``barlow_twins``, ``vicreg``, ``nt_xent``, ``info_nce``, ``clip``, ``siglip`` or, by labels,
            ``sup_con``, ``triplet_margin``, ``smooth_triplet``.
        lambd: Weight of the off-diagonal terms of Barlow Twins. The thesis prints 2e-2; its code and Barlow Twins use
            about 5e-3.
        center: Subtract the batch mean of each column in Barlow Twins; off gives thesis eq. 6.3.2 literally.
        options: Further arguments of the loss, by keyword, such as ``{variant: thesis}`` of Barlow Twins or
            ``{temperature: 0.1}`` of ``nt_xent``; also one by one, ``--loss.options.temperature 0.1``.
        labels: Samples of one class belong together, and those with a class alone are trained on. Losses by labels do
            so always, ``nt_xent`` if this is true, the others never.
    """

    name: str = "barlow_twins"
    lambd: float = 5e-3
    center: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    labels: bool | None = None


@dataclass
class StageSettings:
    """What every stage of training can be told; each section and each stage of a method has its own defaults.

    Args:
        lr: Learning rate.
        epochs: The most passes over the samples.
        batch_size: Samples per optimiser step, over all processes.
        fused: One kernel for all weights in the optimiser's step, which is faster and rounds otherwise: on a GPU
            when left out, but for ``16-mixed``.
        optimiser: ``adam``, or ``adamw``, whose weight decay is not part of the gradient.
        weight_decay: Of all weights that learn.
        clip: Largest norm of the gradients of a step, all of them together; no limit when left out.
        schedule: ``constant``; ``plateau`` lowers the rate when the monitor stands still; ``cosine`` falls from the
            first step behind the warm-up to zero at the end of the last epoch.
        warmup_steps: Optimiser steps over which the learning rate rises linearly, under any schedule.
        plateau_patience: Epochs in a row without a better value of the monitor that are let pass: after one more the
            learning rate is multiplied by ``plateau_factor``, so with 2 after the third (PyTorch's counting, which
            the thesis' code used). Better is by more than a ten-thousandth.
        plateau_factor: See ``plateau_patience``.
        ema: Decay per step, such as 0.999, of an exponential moving average of the weights, which is then what is
            validated, saved and handed on; 0 switches it off. Step t takes no more than (1 + t) / (10 + t).
        frozen: Parts that do not learn, such as ``{encoder: true}``, or for how many epochs they do not, such as
            ``{encoder: 3}``. They are in evaluation mode, without dropout.
        monitor: Logged quantity by which the best epoch is kept as ``best.ckpt``; without it the last weights count.
        better: Whether the monitor is to be ``lower`` or ``higher``.
        patience: Epochs in a row without a better value of the monitor after which training stops: with 10 after the
            tenth. Never when left out.
    """

    lr: float = 1e-3
    epochs: int = 20
    batch_size: int = 170
    optimiser: Literal["adam", "adamw"] = "adam"
    fused: bool | None = None
    weight_decay: float = 0.0
    clip: float | None = None
    schedule: Literal["constant", "plateau", "cosine"] = "constant"
    warmup_steps: int = 0
    plateau_patience: int = 2
    plateau_factor: float = 0.5
    ema: float = 0.0
    frozen: dict[str, bool | int] = field(default_factory=dict)
    monitor: str | None = None
    better: Literal["lower", "higher"] = "lower"
    patience: int | None = None


@dataclass
class PretrainingConfig(StageSettings):
    """Stages without labels: Adam without schedule, a fixed number of epochs, last weights kept.

    The thesis prints a learning rate of 3e-6, yet its code ran 1e-3, for the printed value was never read. Fewer than
    150 optimiser steps in all are warned about. The last incomplete batch is dropped; a data set smaller than one
    batch makes a single batch of all its samples.
    """


@dataclass
class SupervisedConfig(StageSettings):
    """Stages with labels: Adam, plateau halving, early stopping; the best epoch is what is tested.

    Args:
        linear_lr: Learning rate when the encoder is frozen and only the linear head learns; ``lr`` when left out.
        head_dropout: Dropout on the fused vector before the linear head.
    """

    lr: float = 3e-4
    epochs: int = 100
    batch_size: int = 32
    schedule: Literal["constant", "plateau", "cosine"] = "plateau"
    monitor: str | None = "valid_loss"
    patience: int | None = 10
    linear_lr: float | None = None
    head_dropout: float = 0.0


@dataclass
class RunConfig:
    """Where and how to run.

    Args:
        folder: Folder of the run; created when it does not exist.
        seed: Seed of weights, batches, dropout and augmentation: a run is a function of it.
        accelerator: Device; ``auto`` takes a GPU where there is one.
        devices: Processes on each machine that share every step, one to a GPU. Under torchrun it need not be given.
        nodes: Machines. Under torchrun it need not be given.
        strategy: ``auto``: ``ddp``, that is gradients averaged over processes, where there are several.
        precision: ``32-true``, or mixed precision by autocast.
        tensorboard: Write TensorBoard event files beside the CSV log.
        threads: CPU threads; torch's choice when left out. Bits of a result may depend on it.
        checkpoint_seconds: Least time between two checkpoints to resume from; they are written at ends of epochs.
        progress: ``auto``: a progress bar on a terminal, nothing elsewhere; ``on``: plain lines elsewhere; ``off``.
    """

    folder: str = "runs/run"
    seed: int = 0
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: Literal["auto", "ddp"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    tensorboard: bool = True
    threads: int | None = None
    checkpoint_seconds: float = 10.0
    progress: Literal["auto", "on", "off"] = "auto"


@dataclass
class Config:
    """Everything that decides a run's result, saved as ``config.yaml`` in its folder."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass
class ExperimentConfig:
    """What ``mmfast experiment`` compares; ``run.seed`` and ``data.fold`` then play no part.

    Args:
        methods: ``FS`` fully supervised; ``SLE`` supervised linear evaluation of a random frozen encoder; ``SSL``
            pre-training and fine-tuning; ``LE`` linear evaluation of the frozen pre-trained encoder; or a YAML file
            of stages as for ``mmfast train``, whose data, task and run play no part. What methods begin with in
            common is run once.
        seeds: One run of everything for each.
        baselines: Add rows for mean-pooled ridge regression and for a constant prediction.
        workers: Processes side by side; one for each core when left out, one in all on a GPU. Each uses
            ``run.threads`` threads, by default 1, so that results do not depend on the number of workers.
    """

    methods: list[str] = field(default_factory=lambda: ["FS", "SLE", "SSL", "LE"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    baselines: bool = True
    workers: int | None = None


def _positive(value: float) -> bool:
    return 0 < value < inf


def _weights(value: Any) -> bool:
    return not isinstance(value, list) or (bool(value) and all(map(_positive, value)))


def _distinct(values: list) -> bool:
    return len(values) > 0 and len(set(values)) == len(values)


# (path of the field, what it must be, whether a value is so); types are the parser's business.
RULES = (
    *((f"data.{name}", rule, holds) for name, rule, holds in DATA_RULES),
    ("run.folder", "a path", bool),
    ("loss.lambd", "finite and at least 0", lambda v: 0 <= v < inf),
    ("task.class_weights", "positive numbers, balanced or none", _weights),
    ("task.positive_weights", "positive numbers, balanced or none", _weights),
    ("task.threshold", "in (0, 1)", lambda v: v is None or 0 < v < 1),
    ("supervised.linear_lr", "positive", lambda v: v is None or _positive(v)),
    ("run.checkpoint_seconds", "at least 0", lambda v: v >= 0),
    # Far more than any machine has: OpenMP ends the process where it cannot allocate its threads.
    ("run.threads", "in [1, 4096]", lambda v: v is None or 1 <= v <= 4096),
    ("run.devices", "positive", _positive),
    ("run.nodes", "positive", _positive),
    ("run.seed", *SEED),
)

# The same for a stage's settings; the first rule of a setting that does not hold is told.
STAGE_RULES = (
    ("lr", "positive", _positive),
    ("epochs", "positive", _positive),
    ("batch_size", "positive", _positive),
    ("weight_decay", "finite and at least 0", lambda v: 0 <= v < inf),
    ("clip", "positive", lambda v: v is None or _positive(v)),
    ("warmup_steps", "at least 0", lambda v: v >= 0),
    ("plateau_patience", "at least 0", lambda v: v >= 0),
    ("plateau_factor", "in (0, 1)", lambda v: 0 < v < 1),
    ("ema", "in [0, 1)", lambda v: 0 <= v < 1),
    ("patience", "positive", lambda v: v is None or v > 0),
    ("frozen", "true, false or a number of epochs of each part", lambda v: all(n >= 0 for n in v.values())),
)

EXPERIMENT_RULES = (
    ("methods", "at least one, each once", _distinct),
    (
        "seeds",
        "at least one, each once and of 64 bits",
        lambda v: _distinct([s % 2**64 for s in v]) and all(SEED[1](s) for s in v),
    ),
    ("workers", "positive", lambda v: v is None or v > 0),
)


def check(config: Config) -> None:
    """Refuse settings out of range that no component checks for itself.

    Raises:
        UserError: names the first such setting, its rule and its value.
    """
    _check(config, RULES, "")
    check_loss(config.loss)
    check_stage(config.pretraining, "pretraining", least=2)
    check_stage(config.supervised, "supervised")


def check_stage(settings: StageSettings, where: str, least: int = 1) -> None:
    """:func:`check` for the settings of a stage, called ``where``, whose steps need so many samples."""
    _check(settings, STAGE_RULES, f"{where}.")
    if settings.batch_size < least:
        raise UserError(
            f"config: {where}.batch_size must be at least {least}, for a loss over one sample is undefined, "
            f"got {settings.batch_size}"
        )
    if settings.monitor is None:
        for name, wants in (("schedule", settings.schedule == "plateau"), ("patience", settings.patience)):
            if wants:
                raise UserError(
                    f"config: {where}.monitor must name a quantity that {where}.{name} follows, got null"
                )


def check_experiment(config: ExperimentConfig) -> None:
    """:func:`check` for the settings of an experiment."""
    _check(config, EXPERIMENT_RULES, "experiment.")


def _check(config: Any, rules: tuple, prefix: str) -> None:
    for path, rule, holds in rules:
        value = attrgetter(path)(config)
        if not holds(value):
            raise UserError(
                f"config: {prefix}{path} must be {rule}, got {'nothing' if value == '' else value}"
            )


def differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], ignore: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, our and their value of each setting in which two nested mappings differ; None if absent."""
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        a, b = ours.get(key), theirs.get(key)
        if key in ignore or a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inner = tuple(name.removeprefix(f"{key}.") for name in ignore)
            yield from ((f"{key}.{name}", x, y) for name, x, y in differences(a, b, inner))
        else:
            yield key, a, b
