"""mmfast's own file of utterances: one .npz archive, no pickle.

The arrays of the archive (numpy.savez of a dict writes it; h5py is not needed):

    format                       the string "mmfast-data 1"
    name                         string, the corpus (optional)
    task                         string, regression, classification or multilabel (optional, regression)
    targets                      (T,) string, names of the classes or of the K columns of the labels (optional)
    label_range                  (2,) float, smallest and largest possible label of a regression (optional, see
                                 MultimodalData)
    sample_rate                  integer, of sound, in Hz (optional)
    protocol                     string, JSON of what and how cross_validation is divided (optional, see divide)
    SPLIT/MODALITY/values        (sum of lengths, F) float: the real steps of all samples, one after another
    SPLIT/MODALITY/lengths       (N,) integer: steps of each sample, 0 where the modality is missing
    SPLIT/labels                 (N,) numbers, or indices or names of classes; (N, K) numbers, or labels of 0 and 1;
                                 NaN for none, -1 for classes and labels, "" for names (optional, none at all)
    SPLIT/ids                    (N,) integer, unique over train, valid, test and unlabelled (optional)
    SPLIT/names                  (N,) string (optional, the ids)
    SPLIT/groups                 (N,) string, speakers or videos that are not to be divided (optional, none);
                                 SPLIT/groups/KIND where there are several kinds of groups
    SPLIT/words                  (N,) string, JSON lists of a sample's words (optional, none)
    SPLIT/transcripts            (N,) string, JSON strings (optional, none)

SPLIT is train, valid, test, unlabelled or cross_validation; a file needs one of them at least, so data to
predict for may be a single `test`. MODALITY is any printable name without "/"; text, audio and visual are the
usual ones. Samples of cross_validation keep the ids they have elsewhere; an unlabelled split with train's ids is
train.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch

from mmfast.data.corpus import MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.data.readers.archive import describe_archive, read_archive
from mmfast.data.readers.format import Format
from mmfast.errors import UserError
from mmfast.split_spec import Protocol

VERSION = "mmfast-data 1"
# Of a sample, as JSON.
BESIDE = {"words", "transcripts"}
POOLS = ("train", "valid", "test", "unlabelled", "cross_validation")


def write(data: MultimodalData, path) -> None:
    """Write all splits to a .npz file: `mmfast.data.save` where the name says so.

    Raises:
        UserError: no samples, a modality whose name cannot be a part of a key, what the format has no place for, a
            path that cannot be written, a full disk.
    """
    for modality in data.modalities:
        # "/" divides keys, and an archive cuts or refuses names with control characters or half surrogates.
        if "/" in modality or not modality.isprintable():
            raise UserError(
                f"save: a modality must be named without / and control characters, got {modality!r}"
            )
    if not any(len(d) for d in (getattr(data, split) for split in POOLS) if d is not None):
        raise UserError("save: data must hold at least one sample, got none")
    arrays = {
        "format": np.array(VERSION),
        "name": np.array(data.name),
        "task": np.array(data.task),
        "targets": np.array(data.targets),
    }
    if data.label_range is not None:
        arrays["label_range"] = np.array(data.label_range, dtype=np.float64)
    if data.sample_rate is not None:
        arrays["sample_rate"] = np.array(data.sample_rate)
    if data.protocol is not None:
        arrays["protocol"] = np.array(json.dumps(data.protocol.words()))
    for split in POOLS:
        dataset = getattr(data, split)
        if dataset is None or len(dataset) == 0:
            continue
        if dataset.tokens is not None:
            raise UserError("save: tokens have no place in a .npz file, any other name makes a file that has")
        arrays[f"{split}/labels"] = dataset.labels.numpy()
        arrays[f"{split}/ids"] = dataset.ids.numpy()
        arrays[f"{split}/names"] = np.array(dataset.names)
        for kind, names in dataset.groups.items():
            arrays[f"{split}/groups/{kind}"] = np.array(names)
        for kind in BESIDE:
            if (items := getattr(dataset, kind)) is not None:
                arrays[f"{split}/{kind}"] = np.array([json.dumps(item) for item in items])
        for modality in dataset.modalities:
            arrays[f"{split}/{modality}/values"] = dataset.flat(modality).numpy()
            arrays[f"{split}/{modality}/lengths"] = dataset.lengths(modality).numpy()
    _write(Path(path), arrays)


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"save: {path} cannot be written ({error.strerror or error})") from None
    finally:
        partial.unlink(missing_ok=True)


def read_saved(path) -> MultimodalData:
    """Read what `save` wrote, or another program in the same format (see the module's description).

    Raises:
        UserError: a missing, damaged or foreign file, unknown keys, arrays that do not fit together.
    """
    path = Path(path)
    arrays = read_archive(path)
    found = str(arrays.pop("format", "none"))
    if found != VERSION:
        raise UserError(f"{path}: format must be {VERSION!r}, got {found!r}")
    splits = _group(path, arrays)
    try:
        datasets, first_id = {}, 0
        for split, content in splits.items():
            size = len(next(iter(content["lengths"].values()), ()))
            content.setdefault("ids", np.arange(first_id, first_id + size))
            for kind in BESIDE & content.keys():
                content[kind] = [json.loads(item) for item in content[kind].tolist()]
            datasets[split] = MultimodalDataset.from_flat(**content)
            first_id = max(first_id, int(datasets[split].ids.max()) + 1 if size else 0)
        pool, train = datasets.get("unlabelled"), datasets.get("train")
        if pool is not None and train is not None and torch.equal(pool.ids, train.ids):
            datasets["unlabelled"] = train
        return MultimodalData(
            **datasets,
            name=str(arrays.get("name", path.stem)),
            label_range=arrays["label_range"].flatten().tolist() if "label_range" in arrays else None,
            task=str(arrays["task"]) if "task" in arrays else None,
            targets=arrays["targets"].flatten().tolist() if "targets" in arrays else None,
            sample_rate=int(arrays["sample_rate"]) if "sample_rate" in arrays else None,
            protocol=Protocol.of_words(json.loads(str(arrays["protocol"]))) if "protocol" in arrays else None,
            padding="none, stored without",
            layout="mmfast .npz file",
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from None


def _group(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, dict]:
    splits: dict[str, dict] = {}
    for key, array in arrays.items():
        match key.split("/"):
            case ["name" | "label_range" | "task" | "targets" | "sample_rate" | "protocol"]:
                pass
            case [split, ("labels" | "ids" | "names" | "words" | "transcripts") as kind] if split in POOLS:
                splits.setdefault(split, {"values": {}, "lengths": {}})[kind] = array
            case [split, "groups"] if split in POOLS:
                content = splits.setdefault(split, {"values": {}, "lengths": {}})
                content["groups"] = {**content.get("groups", {}), "group": array}
            case [split, "groups", kind] if split in POOLS and kind:
                groups = splits.setdefault(split, {"values": {}, "lengths": {}}).setdefault("groups", {})
                groups[kind] = array
            case [split, modality, ("values" | "lengths") as kind] if split in POOLS and modality:
                splits.setdefault(split, {"values": {}, "lengths": {}})[kind][modality] = array
            case _:
                raise UserError(
                    f"{path}: keys must be name, task, targets, label_range, sample_rate, protocol, SPLIT/labels, "
                    "SPLIT/ids, SPLIT/names, SPLIT/groups, SPLIT/groups/KIND, SPLIT/MODALITY/values or "
                    f"SPLIT/MODALITY/lengths, SPLIT in {POOLS}, got {key!r}"
                )
    for split, content in splits.items():
        if content["values"].keys() != content["lengths"].keys():
            raise UserError(
                f"{path}: {split} must have values and lengths of the same modalities, "
                f"got {sorted(content['values'])} and {sorted(content['lengths'])}"
            )
    return splits


FORMAT = Format(
    "an mmfast .npz file",
    lambda source: source.kind == "zip" and "format.npy" in source.members,
    lambda source, options: read_saved(source.path),
    lambda source: describe_archive(source.path),
)
