"""Files that a repository published with their SHA-256, told by their contents.

From the README of thuiar/MMSA (section 2, Datasets).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from mmfast.data.source import regular
from mmfast.errors import UserError

# Samples of train, valid and test -> corpus. Only files of these sizes are worth hashing.
SIZES = {(1284, 229, 686): "MOSI", (16326, 1871, 4659): "MOSEI", (1368, 456, 457): "CH-SIMS"}
SHA256 = {
    "78e0f8b5ef8ff71558e7307848fc1fa929ecb078203f565ab22b9daab2e02524": "MOSI/Processed/unaligned_50.pkl",
    "d3994fd25681f9c7ad6e9c6596a6fe9b4beb85ff7d478ba978b124139002e5f9": "MOSI/Processed/aligned_50.pkl",
    "ad8b23d50557045e7d47959ce6c5b955d8d983f2979c7d9b7b9226f6dd6fec1f": "MOSEI/Processed/unaligned_50.pkl",
    "45eccfb748a87c80ecab9bfac29582e7b1466bf6605ff29d3b338a75120bf791": "MOSEI/Processed/aligned_50.pkl",
    "c9e20c13ec0454d98bb9c1e520e490c75146bfa2dfeeea78d84de047dbdd442f": "SIMS/Processed/unaligned_39.pkl",
}


def corpus(path: Path, sizes: Sequence[int]) -> tuple[str | None, str]:
    """Name of the corpus that has splits of these sizes, or None; and which published file this is, to be shown."""
    name = SIZES.get(tuple(sizes))
    if name is None:
        return None, ""
    known = SHA256.get(sha256(path))
    return name, f", {known} as MMSA published it" if known else ", of unknown SHA-256"


def sha256(path: Path) -> str:
    """64 hexadecimal digits."""
    digest = hashlib.sha256()
    try:
        with regular(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()
