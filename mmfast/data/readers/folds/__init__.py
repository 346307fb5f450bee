"""The lists of videos by which published work divides CMU's corpora.

Ids only, from CMU-MultiComp-Lab/CMU-MultimodalSDK, `mmdatasdk/dataset/standard_datasets/*/*_std_folds.py`, under the
licence that stands beside them.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cache
from importlib import resources

TITLES = {"cmu_mosi": "CMU-MOSI", "cmu_mosei": "CMU-MOSEI", "pom": "POM", "social_iq": "Social-IQ"}
ENOUGH = 0.95


def standard_folds(videos: Collection[str]) -> tuple[str, dict[str, str]] | None:
    """Title and video -> split of the lists that hold at least 95 % of the videos, or None."""
    videos = set(videos)
    shares = {name: len(videos & _lists(name).keys()) / max(len(videos), 1) for name in TITLES}
    name = max(shares, key=shares.get)
    return (TITLES[name], _lists(name)) if shares[name] >= ENOUGH else None


@cache
def _lists(name: str) -> dict[str, str]:
    content = json.loads((resources.files(__name__) / f"{name}.json").read_text())
    return {video: split for split, listed in content.items() for video in listed}
