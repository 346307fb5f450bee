"""What each phase trains on, is validated with and tested on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b

import torch

from mmfast.data import (
    MultimodalData,
    MultimodalDataset,
    Standardiser,
    combine,
    divide,
    folds,
    label_share,
    load,
    synthetic,
)
from mmfast.data.combine import short_names
from mmfast.data.folds import of_protocol
from mmfast.data.load import takes
from mmfast.data.split import fold_parts
from mmfast.data.units import TOGETHER, related, shared
from mmfast.errors import UserError
from mmfast.training.data_config import DataConfig, reading
from mmfast.training.seeds import derive

# Share of samples with labels outside of their range that is none of another range.
SLIPS = 0.01
DIVIDE = "samples that come in one split are divided by data.split, such as 0.7,0.1,0.2"


@dataclass(frozen=True)
class Splits:
    """Standardised data of one run.

    Attributes:
        inputs: everything that pre-training may see: training samples and the unlabelled pool, never a validation
            or test sample.
        train, valid: labelled samples for the supervised phase.
        test: labelled samples that are only ever predicted.
        standardiser: fitted on ``inputs``.
        task, targets: what the labels are, and the names of their columns or classes.
        label_range: smallest and largest possible number; None for other tasks.
        fingerprint: of the whole data set that they were made from.
        identity: of the same with its order and ids, see :func:`identity`.
    """

    inputs: MultimodalDataset
    train: MultimodalDataset
    valid: MultimodalDataset
    test: MultimodalDataset
    standardiser: Standardiser
    task: str
    targets: tuple[str, ...]
    label_range: tuple[float, float] | None
    fingerprint: str
    identity: str

    @property
    def features(self) -> dict[str, int]:
        return self.inputs.features


def load_data(config: DataConfig) -> MultimodalData:
    """The data that ``config.path`` names, with labels of ``config.task``, divided as ``config.split`` says.

    Raises:
        UserError: as :func:`mmfast.data.load` and :func:`mmfast.data.divide`.
    """
    if config.group is not None and config.split is None:
        raise UserError(
            f"config: data.group must be null without data.split, which it concerns, got {config.group}"
        )
    given = reading(config)
    if config.path == "synthetic":
        for name in given:
            raise UserError(f"config: data.{name} must be left out for synthetic data, got {given[name]!r}")
        data = synthetic(**asdict(config.synthetic))
        if config.pool:
            pool = [config.pool] if isinstance(config.pool, str) else config.pool
            data = combine({"synthetic": data}, dict(zip(short_names(pool), map(load, pool), strict=True)))
    else:
        data = load(config.path, pool=config.pool, **given)
    data = data if config.task is None else data.as_task(config.task)
    if config.split is None:
        return data
    return divide(data, config.split, seed=config.split_seed, group=config.group)


def load_other(path: str, config: DataConfig) -> MultimodalData:
    """Other data, read in the way of ``config`` as far as their layout has such a choice, with their own splits."""
    given = {} if path == "synthetic" else {n: v for n, v in reading(config).items() if n in takes(path)}
    data = load(path, **given)
    return data if config.task is None else data.as_task(config.task)


def make_splits(
    data: MultimodalData, config: DataConfig, seed: int, standardiser: Standardiser | None = None
) -> Splits:
    """Splits of one run.

    Data with ``cross_validation`` samples are split by fold ``config.fold`` of their protocol, or of ``config.folds``
    without one; the folds are the same for every ``seed``, which only chooses the labels kept under
    ``config.label_share``.

    Args:
        standardiser: of the checkpoint that the run starts from; by default one is fitted on ``inputs``.

    Raises:
        UserError: no training inputs, no such fold, or a share of labels that leaves none to train with.
    """
    fingerprint, known = data.fingerprint(), identity(data)
    parts = named_parts(data, config)
    train, valid, test = (parts[name] for name in ("train", "valid", "test"))
    inputs = _joined([train, parts["unlabelled"]])
    if len(inputs) == 0:
        raise UserError(
            f"data {data.name}: there is nothing to train on, its train and unlabelled splits are empty; {DIVIDE}"
        )
    for part in (train, valid, test):
        check_range(part, data.label_range, f"label_range of data {data.name}")
    standardiser = standardiser or Standardiser().fit(inputs)
    if config.label_share < 1:
        _check_share(train, config.label_share)
        train = label_share(train, config.label_share, derive(seed, "labels of train"))
        # A small share of a small split may round to nothing, and nothing would tell the best epoch.
        valid = label_share(valid, config.label_share, derive(seed, "labels of valid"), least=1)
    phases = (inputs, _labelled(train), _labelled(valid), _labelled(test))
    standardised = (standardiser.transform(phase) for phase in phases)
    kind = data.task, data.targets, data.label_range
    return Splits(*standardised, standardiser, *kind, fingerprint, known)


def identity(data: MultimodalData) -> str:
    """32 hexadecimal digits for all of the data that a run depends on: their content, and also order, ids and groups.

    Order decides batches, ids and groups folds, ids the draws of the augmentation.
    """
    hashed = blake2b(data.fingerprint().encode(), digest_size=16)
    for name in ("train", "valid", "test", "unlabelled", "cross_validation"):
        if (part := getattr(data, name)) is not None:
            hashed.update(name.encode())
            hashed.update(torch.stack([part.ids, part.fingerprints()]).numpy().tobytes())
            hashed.update(repr(part.groups).encode())
    return hashed.hexdigest()


def named_parts(data: MultimodalData, config: DataConfig | None = None) -> dict[str, MultimodalDataset]:
    """``train``, ``valid``, ``test`` and ``unlabelled``, as they were read.

    What is unlabelled is disjoint from the others. Where it is to be trained on, it has no contents in common with
    validation and test samples, and no video, speaker or group that is kept out of training.

    Args:
        config: of the run that trains; chooses the fold of data that ask for cross-validation. Without it their own
            splits are taken, and all samples that a protocol cross-validates are ``test``.
    """
    named = {name: getattr(data, name) for name in ("train", "valid", "test")}
    pool = data.unlabelled
    if config is not None and (count := fold_count(data, config)) is not None:
        if not 0 <= config.fold < count:
            which = f"data.folds = {count}" if data.protocol is None else f"{count} folds of data {data.name}"
            raise UserError(f"config: data.fold must lie in [0, {which}), got {config.fold}")
        if data.protocol is None:
            named = list(folds(data.cross_validation, config.folds))[config.fold]._asdict()
        else:
            named = fold_parts(data, config.fold)
            pool = named.pop("unlabelled")
    elif config is not None and config.fold:
        raise UserError(
            f"config: data.fold must be 0 for data {data.name}, which ask for no cross-validation, got {config.fold}"
        )
    elif data.protocol is not None:
        named["test"] = data.cross_validation
    if pool is None:
        return {**named, "unlabelled": MultimodalDataset.empty(data.features)}
    known = torch.cat([dataset.ids for dataset in named.values()])
    pool = pool.subset(~torch.isin(pool.ids, known))
    if config is None:
        return {**named, "unlabelled": pool}
    held_out = named["valid"], named["test"]
    # A group that training samples share with the others is not what the data are divided by.
    apart = [group for group in TOGETHER if not any(shared(named["train"], part, group) for part in held_out)]
    return {**named, "unlabelled": pool.subset(~related(pool, held_out, apart))}


def fold_count(data: MultimodalData, config: DataConfig) -> int | None:
    """How many folds there are; None for data that ask for no cross-validation."""
    if data.cross_validation is None:
        return None
    return config.folds if data.protocol is None else len(of_protocol(data.cross_validation, data.protocol))


def check_aligned(dataset: MultimodalDataset) -> None:
    """Refuse samples whose modalities differ in length, which some encoders cannot put on one time axis."""
    unaligned = torch.nonzero(dataset.unaligned()).flatten().tolist()
    if unaligned:
        lengths = ", ".join(f"{m} {int(dataset.lengths(m)[unaligned[0]])}" for m in dataset.modalities)
        raise UserError(
            f"data: a sample must have one length for all its modalities (0 where one is missing), got {lengths} in "
            f"sample {_and_more(dataset, unaligned)}; align the modalities first"
        )


def _and_more(dataset: MultimodalDataset, indices: list[int]) -> str:
    more = f" and {len(indices) - 1} more" if len(indices) > 1 else ""
    return f"{dataset.names[indices[0]]!r} (id {int(dataset.ids[indices[0]])}){more}"


def check_range(dataset: MultimodalDataset, label_range: tuple[float, float] | None, whose: str) -> None:
    """Refuse numbers outside the range that decides the metrics; ``whose`` range it is completes the sentence.

    Published labels have a few slips (CMU-MOSEI: 10/3, 11/3 and 5 among those of [-3, 3]), and metrics clip them.
    """
    if label_range is None:
        return
    low, high = label_range
    wrong = (dataset.labels < low) | (dataset.labels > high)
    outside = torch.nonzero(wrong)[:, 0].unique().tolist()
    if len(outside) > SLIPS * int(dataset.labelled().sum()):
        raise UserError(
            f"data: labels must lie in [{low:g}, {high:g}], {whose}, but for one in a hundred, got "
            f"{float(dataset.labels[wrong][0]):g} in sample {_and_more(dataset, outside)}"
        )


def require_labels(parts: Mapping[str, MultimodalDataset]) -> None:
    """Refuse a part without a labelled sample."""
    for name, part in parts.items():
        if not part.labelled().any():
            raise UserError(f"data: there are no labelled samples in the {name} split; {DIVIDE}")


def _check_share(train: MultimodalDataset, share: float) -> None:
    labelled = int(train.labelled().sum())
    if labelled and not round(share * labelled):
        raise UserError(
            f"config: data.label_share must leave at least one of the {labelled} labelled training samples, "
            f"got {share}, that is {share * labelled:.2g} of them"
        )


def select(data: MultimodalData, split: str, config: DataConfig | None = None) -> MultimodalDataset:
    """One of :func:`named_parts`, or ``all`` of them."""
    parts = named_parts(data, config)
    return _joined(list(parts.values())) if split == "all" else parts[split]


def _joined(datasets: list[MultimodalDataset]) -> MultimodalDataset:
    filled = [dataset for dataset in datasets if len(dataset)]
    return MultimodalDataset.concatenate(filled) if filled else datasets[0]


def _labelled(dataset: MultimodalDataset) -> MultimodalDataset:
    return dataset.subset(dataset.labelled())
