"""One row of the table of layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mmfast.data.corpus import MultimodalData
from mmfast.data.options import Options
from mmfast.data.source import Source

Contents = list[tuple[str, tuple[int, ...], str]]


@dataclass(frozen=True)
class Format:
    """How files of one layout are told apart, read, and listed.

    Attributes:
        title: what is recognised, in a few words with an article.
        recognises: whether the content is of this layout; cheap, and never raises.
        read: the data, or a UserError of one sentence.
        contents: (key, shape, dtype) of every array.
        takes: names of the options that `read` acts on; `load` does what it can of the others.
    """

    title: str
    recognises: Callable[[Source], bool]
    read: Callable[[Source, Options], MultimodalData]
    contents: Callable[[Source], Contents]
    takes: frozenset[str] = frozenset()
