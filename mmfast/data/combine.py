"""Several sources made one corpus."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mmfast.data.batch import canonical
from mmfast.data.corpus import SPLITS, MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.errors import UserError

LABELS = ("task", "targets", "label_range")


def combine(
    sources: Mapping[str, MultimodalData],
    pool: Mapping[str, MultimodalData] | None = None,
    divided: bool = False,
) -> MultimodalData:
    """All samples of several corpora, split by split.

    Samples get new ids. Of several sources, and of the pool, names become `SOURCE/NAME` and groups `SOURCE/GROUP`, as
    speaker 1 of one is not speaker 1 of another; where a source knows nothing of a group that others have, it is "".
    Modalities that a source lacks are missing in its samples.

    Args:
        sources: short name -> corpus; they must agree in feature sizes, task, targets and range of labels.
        pool: the same of corpora of which all samples become unlabelled ones, whatever their labels and splits.
        divided: the result is to be divided anew, so that sources need not agree in whether they are cross-validated.

    Raises:
        UserError: sources that do not agree, or the same data twice.
    """
    pool = pool or {}
    every = {**sources, **pool}
    _check_labels(sources)
    features = _features(every)
    shared = _check_copies(every)
    rate = _agreed(every, "sample_rate", lambda data: data.sample_rate)
    kinds = dict.fromkeys(kind for data in every.values() for part in distinct(data) for kind in part.groups)
    offset, new = 0, {}
    for name, data in every.items():
        prefix = f"{name}/" if name in pool or len(sources) > 1 else ""
        new[name], offset = _renumbered(data, features, list(kinds), prefix, offset)
    own = [new[name] for name in sources]
    first = next(iter(sources.values()))
    crossed = [parts.get("cross_validation") for parts in own]
    folded = all(part is not None for part in crossed)
    if not folded and any(part is not None for part in crossed) and not divided:
        names = " and ".join(name for name, part in zip(sources, crossed, strict=True) if part is not None)
        raise UserError(
            f"load: all sources must ask for cross-validation or none, unless split is given, got {names}"
        )
    if folded and not divided:
        _agreed(sources, "protocol", lambda data: data.protocol and data.protocol.words())
    pools = [part for name in pool for part in _distinct(new[name])]
    pools = [part.with_labels(None).as_task(first.task, first.targets) for part in pools]
    parts = _merged(own, folded, pools)
    return MultimodalData(
        **parts,
        name="+".join(every),
        label_range=first.label_range,
        task=first.task,
        targets=first.targets,
        warnings=[*(f"{name}: {w}" for name, data in every.items() for w in data.warnings), *shared],
        padding=_told(data.padding for data in every.values()),
        layout=_told(data.layout for data in every.values()),
        sample_rate=rate,
        protocol=first.protocol if folded else None,
    )


def short_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """A distinct name of each path: of its last parts as many as it takes.

    Raises:
        UserError: one path twice.
    """
    whole = [Path(os.path.abspath(path)) for path in paths]
    twice = next((path for i, path in enumerate(whole) if path in whole[:i]), None)
    if twice is not None:
        raise UserError(f"load: every source must be given once, got {twice.name} twice")
    parts = [path.parts if path.is_dir() else (*path.parts[:-1], path.stem) for path in whole]
    for few in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-few:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [path.as_posix() for path in whole]


def _distinct(parts: Mapping[str, MultimodalDataset]) -> list[MultimodalDataset]:
    """Each sample once: no pool that is train, and of those to be cross-validated what no split has."""
    found, known = [], None
    for part in parts.values():
        new = (
            torch.ones(len(part), dtype=torch.bool, device="cpu")
            if known is None
            else ~torch.isin(part.ids, known)
        )
        if new.any():
            found.append(part if new.all() else part.subset(new))
        known = part.ids if known is None else torch.cat([known, part.ids])
    return found


def distinct(data: MultimodalData) -> list[MultimodalDataset]:
    """The splits and the samples to be cross-validated, in which each sample stands once."""
    return _distinct(_named(data))


def _named(data: MultimodalData) -> dict[str, MultimodalDataset]:
    named = {name: getattr(data, name) for name in (*SPLITS, "cross_validation")}
    return {name: part for name, part in named.items() if part is not None}


def _merged(
    own: Sequence[Mapping[str, MultimodalDataset]], folded: bool, pools: list[MultimodalDataset]
) -> dict[str, MultimodalDataset | None]:
    """Split -> the samples of all; `folded`: they are to be cross-validated."""
    joined: dict[str, list[MultimodalDataset]] = {name: [] for name in (*SPLITS, "cross_validation")}
    joined["unlabelled"] = pools
    trained = [parts.get("unlabelled") is parts["train"] for parts in own]
    same = all(trained) and not pools
    for parts, pool_is_train in zip(own, trained, strict=True):
        for name in ("train", "valid", "test"):
            # Where folds take the place of train, its samples are pre-trained on as the pool alone.
            moved = name == "train" and pool_is_train and folded and not same
            joined["unlabelled" if moved else name].append(parts[name])
        if not pool_is_train and "unlabelled" in parts:
            joined["unlabelled"].append(parts["unlabelled"])
        if folded:
            joined["cross_validation"].append(parts["cross_validation"])
        elif "cross_validation" in parts:
            joined["train"] += _distinct(parts)[len(_distinct({k: parts[k] for k in parts if k in SPLITS})) :]
    found = {name: _joined(datasets) for name, datasets in joined.items()}
    return found | ({"unlabelled": found["train"]} if same else {})


def _joined(datasets: Sequence[MultimodalDataset]) -> MultimodalDataset | None:
    filled = [dataset for dataset in datasets if len(dataset)]
    if len(filled) < 2:
        return (filled or [*datasets, None])[0]
    return MultimodalDataset.concatenate(filled)


def _renumbered(
    data: MultimodalData, features: Mapping[str, int], kinds: Sequence[str], prefix: str, offset: int
) -> tuple[dict[str, MultimodalDataset], int]:
    """Split -> its samples with ids from `offset` on, and the first id that is free then."""
    old = torch.cat([part.ids for part in distinct(data)])
    order = old.argsort()
    done: dict[int, MultimodalDataset] = {}
    for part in _named(data).values():
        if id(part) not in done:
            groups = part.groups
            done[id(part)] = _with(part, features).identified(
                order[torch.searchsorted(old[order], part.ids)] + offset,
                [prefix + name for name in part.names],
                {
                    kind: [value and prefix + value for value in groups.get(kind, [""] * len(part))]
                    for kind in kinds
                },
            )
    return {name: done[id(part)] for name, part in _named(data).items()}, offset + len(old)


def _with(dataset: MultimodalDataset, features: Mapping[str, int]) -> MultimodalDataset:
    """The same samples with these modalities, of which those that they lack are missing."""
    if list(dataset.features) == list(features):
        return dataset
    own, none = dataset.features, torch.zeros(len(dataset), dtype=torch.int64, device="cpu")
    values = {
        m: dataset.flat(m) if m in own else torch.empty(0, f, device="cpu") for m, f in features.items()
    }
    return dataset.with_values(values, {m: dataset.lengths(m) if m in own else none for m in features})


def _features(every: Mapping[str, MultimodalData]) -> dict[str, int]:
    found: dict[str, tuple[int, str]] = {}
    for name, data in every.items():
        for modality, size in data.features.items():
            first, whose = found.setdefault(modality, (size, name))
            if size != first:
                raise UserError(
                    f"load: {name}: {modality} must have {first} features as in {whose}, got {size}"
                )
    return {modality: found[modality][0] for modality in canonical(found)}


def _check_labels(sources: Mapping[str, MultimodalData]) -> None:
    (first, one), *others = sources.items()
    for name, data in others:
        for what in LABELS:
            if getattr(data, what) != getattr(one, what):
                raise UserError(
                    f"load: {name}: {what} must be {_plain(getattr(one, what))} as in {first}, got "
                    f"{_plain(getattr(data, what))}; a pool needs no labels"
                )


def _check_copies(every: Mapping[str, MultimodalData]) -> list[str]:
    """Warnings about samples that several sources have; the same data twice are refused."""
    whole: dict[str, str] = {}
    seen, told = torch.empty(0, dtype=torch.int64, device="cpu"), []
    for name, data in every.items():
        known = data.fingerprint()
        if (other := whole.setdefault(known, name)) != name:
            raise UserError(
                f"load: {name} must hold other data than {other}, got the fingerprint {known} of both"
            )
        parts = distinct(data)
        if count := sum(int(part.among(seen).sum()) for part in parts):
            told.append(
                f"{name}: the contents of {count:,} samples are those of samples of sources before it"
            )
        seen = torch.cat([seen, *(part.fingerprints() for part in parts)])
    return told


def _agreed(every: Mapping[str, MultimodalData], what: str, of):
    (first, one), *others = every.items()
    for name, data in others:
        if of(data) != of(one):
            raise UserError(f"load: {name}: {what} must be {of(one)} as in {first}, got {of(data)}")
    return of(one)


def _plain(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _told(words) -> str:
    return ", ".join(dict.fromkeys(filter(None, words)))
