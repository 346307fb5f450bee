"""Files that a repository published with their SHA-256, told by their contents.

From the README of thuiar/MMSA (section 2, Datasets).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from mmfast.data.source import regular
from mmfast.errors import UserError

# Samples of train, valid and test -> corpus.
SIZES = {(1284, 229, 686): "MOSI", (16326, 1871, 4659): "MOSEI", (1368, 456, 457): "CH-SIMS"}
SHA256 = {
    "78e0f8b5ef8ff71558e7307848fc1fa929ecb078203f565ab22b9daab2e02524": "MOSI/Processed/unaligned_50.pkl",
    "d3994fd25681f9c7ad6e9c6596a6fe9b4beb85ff7d478ba978b124139002e5f9": "MOSI/Processed/aligned_50.pkl",
    "ad8b23d50557045e7d47959ce6c5b955d8d983f2979c7d9b7b9226f6dd6fec1f": "MOSEI/Processed/unaligned_50.pkl",
    "45eccfb748a87c80ecab9bfac29582e7b1466bf6605ff29d3b338a75120bf791": "MOSEI/Processed/aligned_50.pkl",
    "c9e20c13ec0454d98bb9c1e520e490c75146bfa2dfeeea78d84de047dbdd442f": "SIMS/Processed/unaligned_39.pkl",
}


def corpus(sizes: Sequence[int]) -> str | None:
    """The corpus that has splits of these sizes."""
    return SIZES.get(tuple(sizes))


def told(path: Path) -> str:
    """What is known of a file by its SHA-256: where it was published, if it was."""
    digest = hashlib.sha256()
    try:
        with regular(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    known = SHA256.get(digest.hexdigest())
    return f"SHA-256 of MMSA's {known}" if known else "SHA-256 unknown"
