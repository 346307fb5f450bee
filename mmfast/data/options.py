"""How a source is to be read, where it can be read in several ways."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Options:
    """Choices of the reader; each layout knows some of them (`Format.takes`), and `load` the rest.

    Attributes:
        labels: which of several kinds of labels, such as "emotions" or "T".
        modalities: those to keep, such as "audio,text"; where files do not say what is what, also which of them it
            is, such as "audio=COVAREP,text", or how columns are divided, such as "text:300,audio:74,visual:35".
        align: modality whose steps the others are put on by averaging, "words", or "strict" to refuse what is not
            aligned.
        embedding: file of word vectors in GloVe's text format, for text that comes as words.
        labels_from: another file with the labels of the same samples, in the same order.
        classes: "all", to keep samples of classes that are left out by custom.
        rate: of sound, in Hz, to which all is resampled.
        spectrogram: log spectrograms in place of sound.
    """

    labels: str | None = None
    modalities: str | None = None
    align: str | None = None
    embedding: str | None = None
    labels_from: str | None = None
    classes: str | None = None
    rate: int | None = None
    spectrogram: bool = False

    def given(self) -> dict[str, Any]:
        """Name -> value of the options that say something."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) not in (None, False)}
