"""The settings of the data of a run: which, how they are read, how they are divided."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mmfast.split_spec import RULE, parsable


@dataclass
class SyntheticConfig:
    """The built-in generator of MOSEI-like utterances, used when ``data.path`` is ``synthetic``.

    Args:
        samples: Number of samples in all; about 71 % train, 8 % valid, 20 % test.
        seed: Seed of the data, apart from the seed of the run: all runs see the same data.
        labelled: Share of the training samples that have a label, in [0, 1].
        missing: Probability that a modality of a sample is missing.
        corrupt: Share of audio cells that are NaN or -inf.
        max_length: Longest utterance in words.
        features: Modality to feature size; text 300, audio 74, visual 35 when left out.
        task: ``regression`` of the sentiment, ``multilabel``: six emotions as in MOSEI, a third of the samples
            without any, or ``classification``: one of four.
    """

    samples: int = 2000
    seed: int = 0
    labelled: float = 1.0
    missing: float = 0.05
    corrupt: float = 1e-3
    max_length: int = 50
    features: dict[str, int] | None = None
    task: Literal["regression", "classification", "multilabel"] = "regression"


@dataclass
class DataConfig:
    """What to train on.

    Args:
        path: ``synthetic``, or a file or folder of features that ``mmfast inspect`` recognises, or a list of several,
            which are put together: names and groups get their source's name in front.
        pool: Another source, or several, of which all samples are taken for pre-training alone.
        labels: Which of several kinds of labels, such as ``emotions`` or ``T``.
        modalities: Those to keep, such as ``audio,text`` or a list of them. Where files do not say what is what also
            ``audio=COVAREP,text``, or how columns are divided, ``text:300,audio:74,visual:35``.
        align: Modality, or ``words``, on whose steps the others are averaged.
        embedding: File of word vectors in GloVe's text format, for text that comes as words.
        labels_from: Another file with the labels of the same samples in the same order.
        classes: ``all`` keeps samples of classes that are left out by custom.
        rate: Resample sound to this rate in Hz.
        spectrogram: Log spectrograms in place of sound.
        label_share: Share of the labelled training and validation samples whose labels are used, in (0, 1]. The
            choice is seeded by ``run.seed``; pre-training sees all inputs, and the test split is never reduced.
        split: How to divide the data in place of the splits that they have. Shares of train, valid and test, such as
            ``0.7,0.1,0.2``, where 0 keeps the split that there is; a .json or .csv file of names of samples or
            videos; ``kfold:5``; or a group such as ``speaker`` or ``session``, each of which is left out in turn.
            ``kfold:5:2`` and ``speaker:NAME`` are one of these folds. Samples of one video or speaker, and equal
            ones, stay together.
        split_seed: Seed of that division, apart from the seed of the run: all runs see the same splits.
        group: A group that is not divided, in place of video and speaker.
        folds: Number of folds for data that ask for cross-validation of themselves, without ``split``.
        fold: Which fold is tested, from 0, where there are several; validation samples of k-fold are a fifth of the
            others.
        task: What the labels are taken for, where that is not what the data say: classes as numbers, whole numbers as
            classes, columns of 0 and 1 as numbers.
        synthetic: Options of the generator.
    """

    path: str | list[str] = "synthetic"
    pool: str | list[str] | None = None
    labels: str | None = None
    modalities: str | list[str] | None = None
    align: str | None = None
    embedding: str | None = None
    labels_from: str | None = None
    classes: str | None = None
    rate: int | None = None
    spectrogram: bool = False
    label_share: float = 1.0
    split: list[float] | str | None = None
    group: str | None = None
    split_seed: int = 0
    folds: int = 5
    fold: int = 0
    task: Literal["regression", "classification", "multilabel"] | None = None
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


def reading(config: DataConfig) -> dict[str, Any]:
    """What of the settings says how files are read: option of :func:`mmfast.data.load` -> value."""
    values = {name: getattr(config, name) for name in READING}
    if isinstance(values["modalities"], list):
        values["modalities"] = ",".join(values["modalities"])
    return {name: value for name, value in values.items() if value not in (None, False)}


def place(config: DataConfig) -> str:
    """Where the data lie, in words."""
    return config.path if isinstance(config.path, str) else " and ".join(config.path)


READING = (
    "labels",
    "modalities",
    "align",
    "embedding",
    "labels_from",
    "classes",
    "rate",
    "spectrogram",
)
# Wrapped as torch.manual_seed wraps it, see mmfast.checks.check_seed.
SEED = "of 64 bits", lambda v: -(2**63) <= v < 2**64


def _paths(value: Any) -> bool:
    return all(value) and len(set(value)) == len(value) > 0 if isinstance(value, list) else bool(value)


# (field, what it must be, whether a value is so); types are the parser's business.
DATA_RULES = (
    ("path", "a path or synthetic, or several paths, each once", _paths),
    ("pool", "a path, or several, each once", lambda v: v is None or _paths(v)),
    *(
        (name, "a word, not an empty one", lambda v: v is None or _paths(v))
        for name in ("labels", "modalities", "align", "embedding", "labels_from", "classes", "group")
    ),
    ("rate", "positive", lambda v: v is None or v > 0),
    ("label_share", "in (0, 1]", lambda v: 0 < v <= 1),
    ("split", RULE, lambda v: v is None or parsable(v)),
    ("split_seed", *SEED),
    ("folds", "at least 2", lambda v: v >= 2),
    ("fold", "at least 0", lambda v: v >= 0),
)
