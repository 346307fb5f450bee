"""The configuration of a run: what the command line, the YAML files and the Python interface share.

Defaults are those of the thesis (Poulinakis 2023, sections 7.1 to 7.3) where it is clear, and the documented reading where
it contradicts itself or its code. This module imports neither torch nor Lightning, so that ``--help`` stays fast.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal


@dataclass
class SyntheticConfig:
    """The built-in generator, used when ``data.path`` is ``synthetic``.

    Args:
        samples: Number of samples in all three splits together.
        unlabelled: Share of the samples without a label, in [0, 1]; they go to the pre-training pool.
        seed: Seed of the data, apart from the seed of the run: all runs see the same data.
    """

    samples: int = 1000
    unlabelled: float = 0.5
    seed: int = 0


@dataclass
class DataConfig:
    """What to train on.

    Args:
        path: ``synthetic``, or a file or folder of features that ``mmfast inspect`` recognises.
        modalities: Names of the modalities to use; all of the data set's when left out.
        label_share: Share of the labelled training and validation samples whose labels are used, in (0, 1]. The choice
            is seeded by ``run.seed``; pre-training always sees all inputs, and the test split is never reduced.
        synthetic: Options of the generator.
    """

    path: str = "synthetic"
    modalities: list[str] | None = None
    label_share: float = 1.0
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


@dataclass
class ModelConfig:
    """The M3 encoder and the projector.

    Args:
        hidden: Width H of the recurrent layers and attentions.
        dropout: Dropout of the encoder, in [0, 1).
        bidirectional: ``false`` (thesis text), ``fusion`` (what the thesis code ran: only the last LSTM) or ``true`` (M3).
        attention: Self-attention after each modality's LSTM.
        masking: Probability of M3's modality masking during supervised training and pre-training; 0 switches it off.
        projector: Widths of the projector's layers. The last one is the embedding size D.
    """

    hidden: int = 100
    dropout: float = 0.2
    bidirectional: bool | Literal["fusion"] = False
    attention: bool = True
    masking: float = 0.0
    projector: list[int] = field(default_factory=lambda: [1000, 1000, 1000])


@dataclass
class AugmentationConfig:
    """The two chains of augmentations that make the two views of pre-training.

    Args:
        preset: Names joined by ``+``, in order: ``noise``, ``masking``, ``seqaug``, ``feature_masking``, such as
            ``seqaug+noise``; values of thesis table 8.2.1. All chains of table 8.3.2 can be written so.
        view_a: Steps of the first view, each a mapping with ``name`` and the transform's arguments, such as
            ``{name: masking, p: 0.6, q: 0.7}``; replaces the preset in this view.
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
    """Barlow Twins.

    Args:
        lambd: Weight of the off-diagonal terms. The thesis prints 2e-2; its code and Barlow Twins use about 5e-3.
        center: Subtract the batch mean of each column; off gives thesis eq. 6.3.2 literally.
    """

    lambd: float = 5e-3
    center: bool = True


@dataclass
class PretrainingConfig:
    """Self-supervised phase: Adam without schedule, a fixed number of epochs, last weights kept.

    Args:
        lr: Learning rate. The thesis prints 3e-6, yet its code ran 1e-3, for the printed value was never read.
        epochs: Passes over all inputs.
        batch_size: Samples per step. The last incomplete batch is dropped; a data set smaller than one batch makes
            a single batch of all its samples.
    """

    lr: float = 1e-3
    epochs: int = 20
    batch_size: int = 170


@dataclass
class SupervisedConfig:
    """Supervised phase: MAE, Adam, plateau halving, early stopping; the best epoch is what is tested.

    Args:
        lr: Learning rate.
        linear_lr: Learning rate when the encoder is frozen and only the linear head learns; ``lr`` when left out.
        epochs: Most passes over the labelled samples.
        batch_size: Samples per step.
        patience: Epochs without a better validation loss before training stops.
        plateau_patience: Epochs without a better validation loss before the learning rate is multiplied by
            ``plateau_factor``.
        plateau_factor: See ``plateau_patience``.
        head_dropout: Dropout on the fused vector before the linear head.
    """

    lr: float = 3e-4
    linear_lr: float | None = None
    epochs: int = 100
    batch_size: int = 32
    patience: int = 10
    plateau_patience: int = 2
    plateau_factor: float = 0.5
    head_dropout: float = 0.0


@dataclass
class RunConfig:
    """Where and how to run.

    Args:
        folder: Folder of the run; created when it does not exist.
        seed: Seed of weights, batches, dropout and augmentation: a run is a function of it.
        accelerator: Lightning's name of the device, such as ``auto``, ``cpu`` or ``gpu``.
        precision: Lightning's name of the precision, such as ``32-true`` or ``bf16-mixed``.
        tensorboard: Write TensorBoard event files beside the CSV log.
        progress: Progress bar: ``auto`` shows it on a terminal only.
    """

    folder: str = "runs/run"
    seed: int = 0
    accelerator: str = "auto"
    precision: str = "32-true"
    tensorboard: bool = True
    progress: Literal["auto", "on", "off"] = "auto"


@dataclass
class Config:
    """Everything that decides a run's result, saved as ``config.yaml`` in its folder."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    run: RunConfig = field(default_factory=RunConfig)
