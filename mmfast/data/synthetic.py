"""A generator of utterances in the likeness of CMU-MOSEI, so that everything runs with no download."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from mmfast.checks import numpy_generator
from mmfast.data.corpus import MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.data.shares import label_share
from mmfast.data.targets import MULTILABEL, REGRESSION, TASKS
from mmfast.errors import UserError

FEATURES = {"text": 300, "audio": 74, "visual": 35}
# The proportions of CMU-MOSEI's usual packaging (16,326 / 1,871 / 4,659).
SPLITS = {"train": 0.714, "valid": 0.082, "test": 0.204}
LABEL_RANGE = (-3.0, 3.0)
LABEL_STEP = 1 / 3

MEDIAN_WORDS, SPREAD_WORDS = 20.0, 0.55
# Of the two parts of the sentiment.
MEAN, SPREAD = 0.15, 0.8
SHARED, PRIVATE = 6, 10
# Weight of the two sentiment signals by modality: text tells most, faces least. Others count as visual.
LEVEL = {"text": 0.55, "audio": 0.4, "visual": 0.3}
TREND = {"text": 0.9, "audio": 0.7, "visual": 0.5}
# Sentiment of one modality that the others and the label do not share (irony, a blank face).
DISCORD = 0.8
FACTOR_MEMORY, NOISE_MEMORY = 0.8, 0.5
# How strongly the features show each emotion's own part and arousal.
EMOTION = 0.8


class Emotion(NamedTuple):
    """Share of the samples that have it, and its correlations with sentiment and with arousal."""

    share: float
    sentiment: float
    arousal: float


# Shares like those of CMU-MOSEI. Arousal, which all have in common, leaves a third of the samples without any.
EMOTIONS = {
    "happy": Emotion(0.46, 0.55, 0.55),
    "sad": Emotion(0.25, -0.55, 0.5),
    "angry": Emotion(0.20, -0.6, 0.6),
    "fearful": Emotion(0.08, -0.4, 0.6),
    "disgusted": Emotion(0.17, -0.6, 0.6),
    "surprised": Emotion(0.09, 0.0, 0.7),
}
# The classes of one emotion a sample, as in IEMOCAP: the strongest of three, or none that is strong.
CLASSES = ("neutral", "happy", "sad", "angry")
NEUTRAL = 0.25
# log10 of the features' scales: standard deviations within a modality differ by this much.
SCALE_SPREAD = {"text": 0.15, "audio": 1.2, "visual": 0.5}


def synthetic(
    samples: int = 2000,
    seed: int = 0,
    labelled: float = 1.0,
    missing: float = 0.05,
    corrupt: float = 1e-3,
    max_length: int = 50,
    features: Mapping[str, int] | None = None,
    task: str = REGRESSION,
) -> MultimodalData:
    """Word-aligned utterances of text, audio and visual features, labelled with sentiment or emotions.

    The sentiment of an utterance is the sum of two latent parts. *Level* shifts one direction of each
    modality during a burst of a few words: the mean over time shows it. *Trend* lets another direction rise
    or fall through the utterance with mean zero: only a model of the order sees it. Both come with a part of
    their own in each modality, so modalities help each other. Beside them run slow factors, shared and
    private, and noise; each feature mixes them linearly with its own scale and offset (those of audio span
    decades, and its last feature is constant). The label is the sentiment in thirds, clipped to [-3, 3].

    Emotions follow from sentiment, from an arousal that all of them have in common, and from a part of their own,
    which shift directions of the features during the same burst. Of six, each is there or not (multilabel); a third
    of the samples have none. Or a sample has one of four (classification).

    Lengths are log-normal (median 20 words), cut at `max_length`. Everything is a function of the arguments.

    Args:
        samples: in all, divided into train, valid and test as in CMU-MOSEI.
        seed: of the corpus.
        labelled: share of the training samples that keep their label, chosen as by `label_share`.
        missing: probability that a modality of a sample is missing; one is always left.
        corrupt: share of audio cells that are NaN or (as often) -inf.
        max_length: longest utterance in words.
        features: modality -> feature size; default text 300, audio 74, visual 35.
        task: "regression" (sentiment), "multilabel" (`EMOTIONS`) or "classification" (`CLASSES`).

    Raises:
        UserError: an argument out of range.
    """
    features = dict(FEATURES if features is None else features)
    if task not in TASKS:
        raise UserError(f"synthetic: task must be one of {', '.join(TASKS)}, got {task!r}")
    _check(samples, seed, labelled, missing, corrupt, max_length, features)
    rng = numpy_generator("synthetic", seed)
    words = np.exp(rng.normal(np.log(MEDIAN_WORDS), SPREAD_WORDS, samples))
    lengths = np.clip(np.round(words), 1, max_length).astype(np.int64)
    steps = _Steps(lengths)

    level, trend = rng.normal(MEAN, SPREAD, samples), rng.normal(0, SPREAD, samples)
    if task == REGRESSION:
        labels = np.clip(np.round((level + trend) / LABEL_STEP) * LABEL_STEP, *LABEL_RANGE)
        targets, latent = None, np.empty((samples, 0))
    else:
        labels, targets, latent = _emotions(rng, (level + trend - MEAN) / np.hypot(SPREAD, SPREAD), task)
    burst = _burst(rng, steps)
    slope = 2 * steps.position / np.maximum(steps.repeat(lengths) - 1, 1) - 1
    slope *= steps.repeat(lengths > 1)
    shared = steps.autoregressive(rng, SHARED, FACTOR_MEMORY)

    emotions = EMOTION * np.repeat(latent, lengths, axis=0) * burst[:, None]
    values, counts = {}, {}
    absent = _absent(rng, samples, len(features), missing)
    for column, (modality, size) in enumerate(features.items()):
        own_level, own_trend = rng.normal(0, DISCORD, (2, samples))
        signals = np.stack(
            [
                _weight(LEVEL, modality) * steps.repeat(level + own_level) * burst,
                _weight(TREND, modality) * steps.repeat(trend + own_trend) * slope,
            ],
            axis=1,
        )
        factors = np.concatenate(
            [signals, emotions, shared, steps.autoregressive(rng, PRIVATE, FACTOR_MEMORY)],
            axis=1,
            dtype=np.float32,
        )
        value = factors @ rng.normal(0, 1, (factors.shape[1], size)).astype(np.float32)
        value += 2 * steps.autoregressive(rng, size, NOISE_MEMORY)
        scale = 10 ** rng.normal(0, _weight(SCALE_SPREAD, modality), size).astype(np.float32)
        value *= scale
        value += scale * rng.normal(0, 2, size).astype(np.float32)
        if modality == "audio":
            value[:, -1] = 1.0
            _corrupt(rng, value, corrupt)
        here = ~absent[:, column]
        values[modality] = value[steps.repeat(here)]
        counts[modality] = lengths * here

    data = MultimodalDataset.from_flat(
        values, counts, labels, names=[f"synthetic/{i}" for i in range(samples)]
    )
    if task != REGRESSION:
        data = data.as_task(task, targets)
    bounds = np.round(np.cumsum([0, *SPLITS.values()]) * samples).astype(int)
    train, valid, test = (data.subset(np.arange(start, stop)) for start, stop in pairwise(bounds))
    if labelled < 1:
        train = label_share(train, labelled, seed)
    limits = LABEL_RANGE if task == REGRESSION else None
    return MultimodalData(
        train,
        valid,
        test,
        name="synthetic",
        label_range=limits,
        task=task,
        targets=targets,
        padding="none, generated without",
    )


def _emotions(
    rng: np.random.Generator, sentiment: np.ndarray, task: str
) -> tuple[np.ndarray, tuple, np.ndarray]:
    """Labels, their names, and (N, 1 + emotions) what the features show beside sentiment, from (N,) of variance 1."""
    latent = rng.standard_normal((len(sentiment), 1 + len(EMOTIONS)))
    scores = {}
    for (name, e), own in zip(EMOTIONS.items(), latent.T[1:], strict=True):
        rest = np.sqrt(1 - e.sentiment**2 - e.arousal**2)
        scores[name] = e.sentiment * sentiment + e.arousal * latent[:, 0] + rest * own
    if task == MULTILABEL:
        cuts = [NormalDist().inv_cdf(1 - e.share) for e in EMOTIONS.values()]
        return np.stack(list(scores.values()), 1) > cuts, tuple(EMOTIONS), latent
    neutral = np.full(len(sentiment), NEUTRAL)
    return np.stack([neutral, *(scores[name] for name in CLASSES[1:])], 1).argmax(1), CLASSES, latent


class _Steps:
    """The steps of all samples, one after another."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths
        self.starts = np.cumsum(lengths) - lengths
        self.position = np.arange(lengths.sum()) - self.repeat(self.starts)

    def repeat(self, per_sample: np.ndarray) -> np.ndarray:
        """(N,) -> (steps,)."""
        return np.repeat(per_sample, self.lengths)

    def autoregressive(self, rng: np.random.Generator, columns: int, memory: float) -> np.ndarray:
        """(steps, columns) float32 of unit variance, correlation `memory` from step to step of a sample."""
        out = rng.standard_normal((len(self.position), columns), dtype=np.float32)
        fresh = np.float32(np.sqrt(1 - memory**2))
        for t in range(1, int(self.lengths.max())):
            rows = self.starts[self.lengths > t] + t
            out[rows] = np.float32(memory) * out[rows - 1] + fresh * out[rows]
        return out


def _burst(rng: np.random.Generator, steps: _Steps) -> np.ndarray:
    """(steps,) weight of the level: a bell around one word, with mean 1 over the sample."""
    centre, width = rng.random(len(steps.lengths)) * steps.lengths, 0.1 * steps.lengths + 2
    bell = np.exp(-0.5 * ((steps.position - steps.repeat(centre)) / steps.repeat(width)) ** 2)
    return bell * steps.repeat(steps.lengths / np.add.reduceat(bell, steps.starts))


def _absent(rng: np.random.Generator, samples: int, modalities: int, missing: float) -> np.ndarray:
    """(N, M) which modalities are missing; one of each sample is there."""
    absent = rng.random((samples, modalities)) < missing
    absent[np.arange(samples), rng.integers(modalities, size=samples)] &= ~absent.all(1)
    return absent


def _corrupt(rng: np.random.Generator, value: np.ndarray, share: float) -> None:
    cells = rng.choice(value.size, round(share * value.size), replace=False)
    value.flat[cells[::2]] = np.nan
    value.flat[cells[1::2]] = -np.inf


def _weight(table: dict[str, float], modality: str) -> float:
    return table.get(modality, table["visual"])


def _check(samples, seed, labelled, missing, corrupt, max_length, features) -> None:
    whole = {"samples": (samples, 10), "max_length": (max_length, 1)}
    whole |= {f"features[{m!r}]": (f, 1) for m, f in features.items()}
    for name, (value, least) in whole.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"synthetic: {name} must be an integer >= {least}, got {value!r}")
    if not features:
        raise UserError("synthetic: features must name at least one modality, got none")
    for name, value in {"labelled": labelled, "missing": missing, "corrupt": corrupt}.items():
        if not 0 <= value <= 1:
            raise UserError(f"synthetic: {name} must lie in [0, 1], got {value!r}")
