"""The ICT-MMMO movie reviews as processed by CMU: a folder of HDF5 files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmfast.data.corpus import MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.data.readers.one_array import FILES, LABELS, SPLITS, one_array
from mmfast.data.readers.padding import Cut, unpad
from mmfast.errors import UserError

FEATURES = {"text": 300, "audio": 74, "visual": 36}
NEUTRAL = 3.0
LABEL_RANGE = (-2.0, 2.0)


def read_ict_mmmo(folder) -> MultimodalData:
    """Read the folder `{text,audio,video,y}_{train,valid,test}[_emb].h5`.

    Each file holds one data set `d1`: features (N, L, F) with F of text 300 (GloVe), audio 74 (COVAREP), visual 36
    (FACET), labels (N,) in halves from 1 to 5, which become y - 3 in [-2, 2]. Anything else is another corpus under
    these names, which are not ICT-MMMO's alone, and is refused.

    `text_train_emb.h5` is missing from the public release, and may be: text then has length 0 in train, the train
    split (which keeps its labels) is also the unlabelled pool, and `cross_validation` holds the samples of valid and
    test that have every modality.

    Lengths. Short utterances are padded with zeros in front. Besides, a quarter of the samples, nearly all of
    them without padding in front, end in up to seven steps that are zero in every modality at once: no word,
    sound or face was measured there. Such steps say nothing, and standardised they would lie far from all
    data, so both ends are cut: the real steps run from the first to the last at which any modality is not all
    zero. A zero step inside (a face not found) is real. The modalities are word-aligned and share one length,
    but one that is zero at all steps of a sample is missing there and has length 0.

    Raises:
        UserError: missing, truncated, foreign or empty files, wrong shapes, sizes that do not match, other
            labels; one sentence that names the file.
    """
    folder = Path(folder)
    arrays = _read(folder)
    datasets, first_id, cuts = {}, 0, Cut()
    for split in SPLITS:
        labels = arrays["y", split] - NEUTRAL
        values, lengths, cut = unpad(
            {m: arrays[m, split] for m in FILES if (m, split) in arrays}, aligned=True
        )
        cuts += cut
        for modality in FILES.keys() - values.keys():
            values[modality] = np.empty((0, FEATURES[modality]), np.float32)
            lengths[modality] = np.zeros(len(labels), np.int64)
        datasets[split] = MultimodalDataset.from_flat(
            values,
            lengths,
            labels,
            ids=np.arange(first_id, first_id + len(labels)),
            names=[f"{split}/{i}" for i in range(len(labels))],
        )
        first_id += len(labels)
    if ("text", "train") not in arrays:
        rest = MultimodalDataset.concatenate([datasets["valid"], datasets["test"]])
        complete = np.all([rest.lengths(m).numpy() > 0 for m in rest.modalities], axis=0)
        datasets |= {"unlabelled": datasets["train"], "cross_validation": rest.subset(complete)}
    return MultimodalData(
        **datasets, name="ICT-MMMO", label_range=LABEL_RANGE, padding=str(cuts), layout="ICT-MMMO folder"
    )


def _read(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    arrays = {}
    for split in SPLITS:
        for modality, pattern in FILES.items():
            path = folder / pattern.format(split)
            if (modality, split) != ("text", "train") or path.exists():
                arrays[modality, split] = one_array(path, 3, "(N, L, F)")
        path = folder / LABELS.format(split)
        arrays["y", split] = _labels(path)
        for modality, pattern in FILES.items():
            if (modality, split) in arrays:
                name, array = folder / pattern.format(split), arrays[modality, split]
                _check(name, "N", len(array), len(arrays["y", split]), path.name)
                _check(name, "L", array.shape[1], arrays["audio", split].shape[1], f"audio of {split}")
                _check(name, "F", array.shape[2], FEATURES[modality], f"{modality} of ICT-MMMO")
    return arrays


def _check(path: Path, axis: str, got: int, wanted: int, reference: str) -> None:
    if got != wanted:
        raise UserError(f"{path}: d1 must have {axis} = {wanted} as {reference}, got {got}")


def has_its_labels(labels: np.ndarray) -> np.ndarray:
    """(N,) bool: halves from 1 to 5."""
    return (labels >= 1) & (labels <= 5) & (2 * labels % 1 == 0)


def _labels(path: Path) -> np.ndarray:
    labels = one_array(path, 1, "(N,)")
    foreign = np.flatnonzero(~has_its_labels(labels))
    if len(foreign):
        i = foreign[0]
        raise UserError(
            f"{path}: labels must be halves in 1..5 as those of ICT-MMMO, got {labels[i]} in d1[{i}]"
        )
    return labels
