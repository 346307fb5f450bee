"""Any source of utterances by name or path."""

from __future__ import annotations

import inspect as signatures
import os
from dataclasses import fields

import numpy as np

from mmfast.data.align import align
from mmfast.data.choose import choose
from mmfast.data.combine import combine, short_names
from mmfast.data.corpus import MultimodalData
from mmfast.data.embedding import embed
from mmfast.data.options import Options
from mmfast.data.readers import csd, foreign, mfn, misa, mmsa, mult, npz, own, slp, sound, tailor
from mmfast.data.readers.format import Format
from mmfast.data.readers.hdf5 import describe_hdf5
from mmfast.data.source import Source
from mmfast.data.split import divide
from mmfast.data.synthetic import synthetic
from mmfast.errors import UserError

# More specific layouts stand before more general ones.
FORMATS: tuple[Format, ...] = (
    own.FORMAT,
    csd.FORMAT,
    mfn.FORMAT,
    mmsa.FORMAT,
    mult.FORMAT,
    tailor.FORMAT,
    slp.FORMAT,
    misa.FORMAT,
    npz.FORMAT,
    foreign.FORMAT,
    sound.FORMAT,
)
# Options that are acted on here for all layouts, where their reader does not.
COMMON = {"embedding": embed, "align": align, "modalities": choose}


# What says something about labels, which a pool has none of.
ABOUT_LABELS = ("labels", "labels_from", "classes")


def load(
    source, *, pool=None, split=None, seed: int = 0, group: str | None = None, **options
) -> MultimodalData:
    """The corpus called `source`: "synthetic" (options as in `synthetic`), or a path, recognised by content.

    Args:
        source: one, or several that are made one, see `combine`.
        pool: a path or several of which all samples come as unlabelled ones.
        split: how to divide the samples, in place of the splits in the files; see `divide`.
        seed: of the division; also of synthetic data.
        group: which is not divided; see `divide`.
        options: of a path, those of :class:`~mmfast.data.options.Options`.

    Raises:
        UserError: nothing there, unknown options, content of no known kind (which is then listed), sources that do
            not go together, or samples that cannot be divided so.
    """
    if group is not None and split is None:
        raise UserError(f"load: group must be given with split alone, which it concerns, got {group!r}")
    sources, pools = _several(source), _several(pool)
    if not sources:
        raise UserError("load: at least one source must be given, got none")
    if "synthetic" in sources:
        options["seed"] = seed
    data = [_read(one, options) for one in sources]
    if len(sources) > 1 or pools:
        others = {} if "synthetic" in sources else {k: v for k, v in options.items() if k not in ABOUT_LABELS}
        names = short_names([*sources, *pools])
        unlabelled = [_read(one, others) for one in pools]
        data = [
            combine(
                dict(zip(names, data, strict=False)),
                dict(zip(names[len(data) :], unlabelled, strict=True)),
                divided=split is not None,
            )
        ]
    return data[0] if split is None else divide(data[0], split, seed=seed, group=group)


def _several(given) -> list:
    return [given] if isinstance(given, (str, os.PathLike)) else list(given or ())


def _read(source, options: dict) -> MultimodalData:
    if source == "synthetic":
        known = signatures.signature(synthetic).parameters
        for name in options.keys() - known:
            raise UserError(f"load: synthetic takes the options {list(known)}, got {name!r}")
        return synthetic(**options)
    known = [f.name for f in fields(Options)]
    for name in options.keys() - set(known):
        raise UserError(f"load: a path takes the options {', '.join(known)}, got {name!r}")
    place = source if isinstance(source, Source) else Source(source)
    options = Options(**options)
    kind = recognise(place)
    # NaN of any kind, and numbers beyond float32, are legal in all layouts.
    with np.errstate(over="ignore", invalid="ignore"):
        return _finished(kind.read(place, options), kind, options, place)


def _finished(data: MultimodalData, kind: Format, options: Options, source: Source) -> MultimodalData:
    """The data that a reader made, with what the options say beside what it has done itself.

    Raises:
        UserError: an option that neither the reader nor anything here acts on.
    """
    for name, value in options.given().items():
        if name not in kind.takes | COMMON.keys():
            raise UserError(
                f"{source.path}: {name} must not be given for {kind.title}, which has no such choice, got {value!r}"
            )
    for name, function in COMMON.items():
        if name in options.given() and name not in kind.takes:
            data = function(data, getattr(options, name))
    return data


def takes(path) -> frozenset[str]:
    """Names of the options that can be given for what stands at a path."""
    return recognise(Source(path)).takes | COMMON.keys()


def recognise(source: Source) -> Format:
    """The format of a file or folder, or a UserError that lists what was found there."""
    if source.kind in ("pickle", "torch"):
        source.object()  # what is damaged or hostile is no unknown layout
    for kind in FORMATS:
        if kind.recognises(source):
            return kind
    known = " and ".join(kind.title for kind in FORMATS)
    raise UserError(
        f"load: {source.path} is of no known kind: found {_describe(source)}; recognised are {known}"
    )


def _describe(source: Source) -> str:
    path = source.path
    if source.kind == "folder":
        return f"a folder with {_few(_names(source))}"
    if not source.start:
        return "an empty file"
    if source.kind == "hdf5":
        try:
            return f"an HDF5 file with {_few([key for key, *_ in describe_hdf5(path)])}"
        except UserError as error:
            return f"an HDF5 file that cannot be read ({error})"
    if source.kind in ("pickle", "torch"):
        return f"a pickle of {_outline(source.object())}"
    if source.start.startswith(b"PK"):
        if source.members:
            return f"an archive with {_few(list(source.members))}"
        return "an archive that is truncated or damaged"
    return f"a {path.suffix or 'nameless'} file that starts with the bytes {source.start[:8].hex(' ')}"


def _outline(value) -> str:
    kind = type(value).__name__
    if isinstance(value, dict):
        return f"a {kind} with {_few([str(key)[:40] for key in list(value)[:7]])}"
    return f"a {kind} of {len(value)}" if isinstance(value, (list, tuple)) else f"a {kind}"


def _names(source: Source) -> list[str]:
    return sorted({name.partition("/")[0] for name in source.files})


def _few(names: list[str], limit: int = 6) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest or "nothing in it"
