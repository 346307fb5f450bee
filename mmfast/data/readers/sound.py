"""Folders of sound files: EmoDB, RAVDESS, IEMOCAP, a table of one's own, or one folder for each class.

Needs soundfile.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch

from mmfast.checks import check_integer
from mmfast.data import spectrogram
from mmfast.data.corpus import MultimodalData
from mmfast.data.options import Options
from mmfast.data.readers.format import Contents, Format
from mmfast.data.readers.parts import Part, assemble
from mmfast.data.readers.sound_names import Clip, Clips, clips_of
from mmfast.data.readers.sound_table import is_manifest, tables
from mmfast.data.resample import resample, resampled
from mmfast.data.source import Source, regular
from mmfast.errors import UserError

MODALITY = "speech"
SUFFIXES = (".wav", ".flac", ".ogg")
# First bytes of a file of each kind, by its name or another: other kinds are not given to the library.
SIGNATURES = (b"RIFF", b"fLaC", b"OggS")
# Hz: no speech below; above, a header would make much of a small file.
LOWEST, HIGHEST = 4_000, 384_000
# Samples that a file of so many bytes may hold: silence takes next to nothing in FLAC.
SAMPLES_A_BYTE, SPARE = 64, 1 << 22
# Samples that are read at a time, entries that are looked at for a sound file, chunks of a WAV file before its data,
# and steps from which on few encoders can take a waveform.
BLOCK, LOOKED_AT, CHUNKS, LONG = 1 << 16, 10_000, 10_000, 10_000


class Header(NamedTuple):
    """What a sound file says of itself: Hz, samples of each channel, channels, and how they are coded."""

    rate: int
    frames: int
    channels: int
    coding: str


def is_sound(source: Source) -> bool:
    """Whether it is a table of sound files, or a folder with one or with such files."""
    try:
        if not source.is_folder:
            return source.kind == "other" and is_manifest(source.path)
        return bool(tables(source)) or next(_walk(source.path, LOOKED_AT), None) is not None
    except (OSError, UserError):
        return False


def read_sound(source: Source, options: Options) -> MultimodalData:
    """One modality ``speech``: waveforms (n, 1) in [-1, 1), or log-spectrograms (steps, 257).

    Channels are averaged. All files have one sampling rate, or are resampled to ``rate``; spectrograms are of 16,000
    Hz, to which all is resampled.

    Raises:
        UserError: soundfile is not installed; a file that is missing, outside of the folder, damaged or of another
            kind; rates that differ; what its names or table say is wrong.
    """
    rate = _wanted(source, options)
    folder, found, warnings = _clips(source, options)
    headers = [_header(folder.file(clip.file)) for clip in found.clips]
    rates = Counter(header.rate for header in headers)
    usual = rates.most_common(1)[0][0]
    if rate is None and len(rates) > 1:
        i = next(i for i, header in enumerate(headers) if header.rate != usual)
        raise UserError(
            f"{folder.path / found.clips[i].file}: has {headers[i].rate} Hz, others {usual}: --rate {usual} resamples"
        )
    rate = rate or usual
    counts = {
        "files of several channels, of which the mean was taken": sum(h.channels > 1 for h in headers),
        f"files resampled to {rate} Hz": sum(h.rate != rate for h in headers),
        "files without any sound, kept as missing": sum(not h.frames for h in headers),
    }
    longest = max(resampled(h.frames, h.rate, rate) for h in headers)
    if not options.spectrogram and longest > LONG:
        counts[
            "steps of the longest waveform, many for an encoder over time (--spectrogram: 100 a second)"
        ] = longest
    warnings += [*found.warnings, *(f"{what}: {count}" for what, count in counts.items() if count)]
    about: dict[str, Any] = {"targets": found.targets, "label_range": found.label_range}
    classes = sorted({clip.label for clip in found.clips if isinstance(clip.label, str)})
    if classes:
        about = {"task": "classification", "targets": classes}
    elif found.targets:
        about["task"] = "regression"
    parts = {}
    for split in dict.fromkeys(clip.split for clip in found.clips):
        own = [i for i, clip in enumerate(found.clips) if clip.split == split]
        parts[split] = _part(folder, found, own, headers, rate, options.spectrogram)
    return assemble(
        source.path,
        parts,
        layout=f"sound files ({found.title})",
        sample_rate=rate,
        warnings=warnings,
        **about,
    )


def contents(source: Source) -> Contents:
    """(file, (samples, channels), coding and rate) of every sound file, by the headers alone."""
    folder, found, _ = _clips(source, Options())
    headers = ((clip.file, _header(folder.file(clip.file))) for clip in found.clips)
    return [(file, (h.frames, h.channels), f"{h.coding} {h.rate} Hz") for file, h in headers]


def _wanted(source: Source, options: Options) -> int | None:
    if options.rate is not None:
        check_integer(str(source.path), "rate", options.rate, LOWEST, HIGHEST)
    if not options.spectrogram:
        return options.rate
    if options.rate not in (None, spectrogram.RATE):
        raise UserError(
            f"{source.path}: rate must be {spectrogram.RATE} for spectrograms, or be left out, got {options.rate}"
        )
    return spectrogram.RATE


def _clips(source: Source, options: Options) -> tuple[Source, Clips, list[str]]:
    """The folder, its samples, and what is to be said of what was not looked at."""
    if source.is_folder:
        linked: list[str] = []
        files = sorted(_walk(source.path, linked=linked))
        said = [f"linked folders, not followed: {len(linked)}"] if linked else []
        return source, clips_of(source, files, options), said
    folder = Source(source.path.absolute().parent)
    return folder, clips_of(folder, [], options, table=source.path.name), []


def _walk(folder: Path, most: int | None = None, linked: list[str] | None = None) -> Iterator[str]:
    """Relative names of the sound files at any depth, hidden ones and linked folders left out."""
    seen = 0
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if linked is not None:
            linked += [name for name in folders if os.path.islink(os.path.join(here, name))]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield Path(here, name).relative_to(folder).as_posix()
        seen += len(folders) + len(files)
        if most is not None and seen > most:
            return


def _part(
    folder: Source, found: Clips, own: Sequence[int], headers: Sequence[Header], rate: int, spectra: bool
) -> Part:
    clips = [found.clips[i] for i in own]
    sizes = [resampled(headers[i].frames, headers[i].rate, rate) for i in own]
    lengths = np.array([spectrogram.frames(n) for n in sizes] if spectra else sizes, np.int64)
    width = spectrogram.BINS if spectra else 1
    try:
        flat = np.empty((int(lengths.sum()), width), np.float32)
        start = 0
        for i, clip, length in zip(own, clips, lengths.tolist(), strict=True):
            sound = resample(_mono(folder.file(clip.file), headers[i]), headers[i].rate, rate)
            steps = spectrogram.spectrogram(torch.from_numpy(sound)).numpy() if spectra else sound[:, None]
            flat[start : start + length] = steps
            start += length
    except MemoryError:
        size = lengths.sum() * width * 4 / 2**30
        raise UserError(f"{folder.path}: its sound must fit into memory, got {size:.0f} GiB") from None
    kinds = dict.fromkeys(kind for clip in clips for kind in clip.groups)
    return Part(
        values={MODALITY: flat},
        lengths={MODALITY: lengths},
        labels=_labels(clips, len(found.targets or ())),
        names=_names(clips),
        groups={kind: [clip.groups.get(kind, "") for clip in clips] for kind in kinds},
    )


def _labels(clips: Sequence[Clip], targets: int) -> Any:
    if all(clip.label is None for clip in clips):
        return None
    if not targets:
        return [clip.label or "" for clip in clips]
    none = float("nan") if targets == 1 else (float("nan"),) * targets
    return np.array([none if clip.label is None else clip.label for clip in clips], np.float32)


def _names(clips: Sequence[Clip]) -> list[str]:
    """Names without folder and ending where they are unique, else the relative paths."""
    stems = [PurePosixPath(clip.file).stem for clip in clips]
    counts = Counter(stems)
    return [clip.file if counts[stem] > 1 else stem for clip, stem in zip(clips, stems, strict=True)]


def _header(path: Path) -> Header:
    with _opened(path) as sound:
        size = path.stat().st_size
        header = Header(sound.samplerate, sound.frames, sound.channels, sound.subtype)
    if not LOWEST <= header.rate <= HIGHEST:
        raise UserError(f"{path}: must have a rate of {LOWEST} to {HIGHEST} Hz, got {header.rate}")
    most = SAMPLES_A_BYTE * size + SPARE
    if not 0 <= header.frames * header.channels <= most:
        raise UserError(
            f"{path}: must hold at most {most} samples in its {size} bytes, its header says "
            f"{header.frames * header.channels}"
        )
    return header


def _mono(path: Path, header: Header) -> np.ndarray:
    """(frames,) float32, the mean of all channels."""
    out = np.empty(header.frames, np.float32)
    filled = 0
    with _opened(path) as sound:
        while filled < len(out):
            block = sound.read(min(BLOCK, len(out) - filled), dtype="float32", always_2d=True)
            if not len(block):
                break
            # Of one channel the number itself.
            out[filled : filled + len(block)] = block[:, 0] if block.shape[1] == 1 else block.mean(1)
            filled += len(block)
    if filled < len(out):
        raise UserError(
            f"{path}: must hold {len(out)} samples as its header says, got {filled}: it is truncated"
        )
    return out


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open `soundfile.SoundFile` of a WAV, FLAC or Ogg file."""
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise UserError(
            f"{path}: reading sound needs soundfile, install mmfast[audio] or soundfile ({error})"
        ) from None
    try:
        with regular(path).open("rb", buffering=0) as file:
            _check_start(path, file)
            file.seek(0)
            with soundfile.SoundFile(file.fileno(), closefd=False) as sound:
                yield sound
    except UserError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or error
        raise UserError(f"{path}: not a readable sound file, truncated or damaged ({reason})") from None


def _check_start(path: Path, file) -> None:
    start, size = file.read(12), os.fstat(file.fileno()).st_size
    if not start:
        raise UserError(f"{path}: must be a sound file, got an empty file")
    if not start.startswith(SIGNATURES):
        raise UserError(
            f"{path}: must be a WAV, FLAC or Ogg file, got one that starts with {start[:4].hex(' ')}"
        )
    if start[:4] != b"RIFF":
        return
    # The library would take what there is of the data for all of it.
    at = 12
    for _ in range(CHUNKS):
        file.seek(at)
        chunk = file.read(8)
        length = int.from_bytes(chunk[4:], "little")
        if len(chunk) < 8:
            return
        if chunk[:4] == b"data":
            if at + 8 + length > size:
                raise UserError(
                    f"{path}: must hold the {length} bytes of sound that its header says, got {size - at - 8}"
                )
            return
        at += 8 + length + length % 2
    raise UserError(f"{path}: must have its data among the first {CHUNKS} chunks, got none")


FORMAT = Format(
    "a folder of sound files (EmoDB, RAVDESS, IEMOCAP, a CSV file with a column path, or one folder a class)",
    is_sound,
    read_sound,
    contents,
    frozenset({"labels", "classes", "rate", "spectrogram"}),
)
