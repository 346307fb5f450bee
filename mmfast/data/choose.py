"""Some of the modalities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmfast.data.batch import canonical
from mmfast.data.corpus import MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.errors import UserError


def choose(data: MultimodalData, modalities: Sequence[str] | str) -> MultimodalData:
    """The data with these modalities alone, in the usual order, whatever order they are named in.

    Samples that have none of them are kept, without any step, and counted in the warnings.

    Args:
        data: with all of them.
        modalities: names, or one string of them with commas.

    Raises:
        UserError: none, or one that the data do not have.
    """
    names = [n.strip() for n in modalities.split(",")] if isinstance(modalities, str) else list(modalities)
    for name in names:
        if name not in data.modalities:
            raise UserError(f"modalities must be among {', '.join(data.modalities)}, got {name!r}")
    if not names:
        raise UserError(f"modalities must name at least one of {', '.join(data.modalities)}, got none")
    kept = canonical(dict.fromkeys(names))
    if kept == data.modalities:
        return data

    out = data.each(lambda dataset: dataset.only(kept))
    left = out.count(MultimodalDataset.without_steps) - data.count(MultimodalDataset.without_steps)
    said = (f"samples with none of {', '.join(kept)}: {left}",) if left else ()
    return replace(out, warnings=(*data.warnings, *said))
