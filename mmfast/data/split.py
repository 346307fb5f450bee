"""Data divided anew, by shares, lists, folds, or one group that is left out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from mmfast.data.corpus import MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.data.folds import held_together, of_protocol, part_of_fold
from mmfast.data.listed import NOWHERE, by_lists
from mmfast.data.readers.parts import NO_SPLIT
from mmfast.data.shares import TEST, TRAIN, VALID, by_shares
from mmfast.data.units import TOGETHER, related
from mmfast.errors import UserError
from mmfast.split_spec import LeaveOut, Lists, Protocol, Shares, Spec, is_protocol, parse

PARTS = {"train": TRAIN, "valid": VALID, "test": TEST}


def divide(
    data: MultimodalData,
    spec: Spec | str | os.PathLike | Sequence[float] | Mapping[str, Sequence[str]],
    *,
    seed: int = 0,
    group: str | None = None,
) -> MultimodalData:
    """The same samples in other splits, which replace those that there are, and any cross-validation.

    Every sample of the splits, and of those to be cross-validated, comes to be in one new split. What goes where is a
    function of the seed and of names (of contents where samples have no names but their ids), not of order or ids.
    Samples that share a `video`, a `speaker` or a `group`, or have equal contents, are never in two splits; `group`
    names another group that is not divided, in place of all these. Samples without a label are trained on, unless
    they belong to some that are not. The pool loses what belongs to validation and test samples.

    Args:
        spec: one of

            - shares of train, valid and test, `(0.7, 0.1, 0.2)` or "0.7,0.1,0.2". Of n labelled samples valid and
              test have floor(share * n), at least one, as near as what must stay together allows; stratified by class
              or set of labels. A share of 0 keeps the split that there is.
            - lists of names of samples or of videos (of values of `group`): a mapping of splits to them, or a .json
              file of it, or a .csv file with the columns name or video and split. Others are left out; `warnings`
              count them.
            - "kfold:5:2", the fold 2 (of 0 to 4) of five; a fifth of what is not tested validates.
            - "speaker:NAME", "GROUP:VALUE": that value is tested. The next value in sorted order validates, or, of
              speakers within sessions, the other speaker of the session.
            - "kfold:5", "speaker", "GROUP": all the folds, for cross-validation. The splits are empty then,
              `cross_validation` holds the samples and `protocol` says how they are divided.

    Raises:
        UserError: none of these, or data that cannot be divided so.
    """
    spec = parse(spec)
    if isinstance(spec, LeaveOut) and group is not None:
        raise UserError(f"split: group must not be given where one {spec.group} is left out, got {group!r}")
    kept = {}
    if isinstance(spec, Shares):
        kept = {name: getattr(data, name) for name in PARTS if getattr(spec, name) == 0}
        if all(len(part) == 0 for part in _sources(data, kept)):
            kept = {}
    whole = _whole(data, kept)
    pool = None if data.unlabelled is data.train else data.unlabelled
    warnings = tuple(said for said in data.warnings if said != NO_SPLIT)
    if is_protocol(spec):
        protocol = Protocol(spec, seed, group)
        folds = of_protocol(whole, protocol)
        if len(folds) < 2:
            raise UserError(
                f"split: {spec.group} must have two values at least to be left out in turn, got {len(folds)}"
            )
        part_of_fold(whole, folds[0], seed, group)  # refuses for all
        empty = dict.fromkeys(PARTS)
        return replace(
            data, **empty, cross_validation=whole, protocol=protocol, unlabelled=pool, warnings=warnings
        )
    if isinstance(spec, Shares):
        part = by_shares(whole, spec.valid, spec.test, seed, group)
    elif isinstance(spec, Lists):
        part = by_lists(whole, spec.source, group or "video")
        if left := int((part == NOWHERE).sum()):
            warnings = (
                *warnings,
                f"{left:,} of {len(part):,} samples are in none of the lists of splits: left out",
            )
    else:
        part = part_of_fold(whole, spec, seed, group)
    parts = {name: whole.subset(part == number) for name, number in PARTS.items()} | kept
    pool = parts["train"] if data.unlabelled is data.train else _training_side(pool, parts, spec, group)
    return replace(data, **parts, unlabelled=pool, cross_validation=None, protocol=None, warnings=warnings)


def fold_parts(data: MultimodalData, fold: int) -> dict[str, MultimodalDataset | None]:
    """train, valid, test and unlabelled of one fold of data with a `protocol`.

    Raises:
        UserError: no such fold.
    """
    whole, protocol = data.cross_validation, data.protocol
    specs = of_protocol(whole, protocol)
    if not 0 <= fold < len(specs):
        raise UserError(f"split: fold must lie in [0, {len(specs)}), got {fold}")
    part = part_of_fold(whole, specs[fold], protocol.seed, protocol.group)
    parts = {name: whole.subset(part == number) for name, number in PARTS.items()}
    return {**parts, "unlabelled": _training_side(data.unlabelled, parts, specs[fold], protocol.group)}


def _sources(data: MultimodalData, kept: Mapping[str, MultimodalDataset]) -> list[MultimodalDataset]:
    own = [getattr(data, name) for name in PARTS if name not in kept]
    return own if data.cross_validation is None else [*own, data.cross_validation]


def _whole(data: MultimodalData, kept: Mapping[str, MultimodalDataset]) -> MultimodalDataset:
    """All samples that are to be divided, each once."""
    found, known = [], torch.cat([data.train.ids[:0], *(part.ids for part in kept.values())])
    for part in _sources(data, kept):
        new = ~torch.isin(part.ids, known)
        if new.any():
            found.append(part if new.all() else part.subset(new))
            known = torch.cat([known, part.ids])
    if not found:
        raise UserError(f"split: data {data.name} have no samples to divide")
    return found[0] if len(found) == 1 else MultimodalDataset.concatenate(found)


def _training_side(
    pool: MultimodalDataset | None, parts: Mapping[str, MultimodalDataset], spec: Spec, group: str | None
) -> MultimodalDataset | None:
    """The pool without what belongs to validation and test samples."""
    if pool is None:
        return None
    groups = TOGETHER if group is None else (group,)
    if isinstance(spec, LeaveOut):
        groups = held_together(spec.group)
    return pool.subset(~related(pool, (parts["valid"], parts["test"]), groups))
