"""What a folder of sound files says of each: class, speaker, session and split, by names, folders or a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from mmfast.data.options import Options
from mmfast.data.readers.sound_table import read_manifest, tables
from mmfast.data.source import Source
from mmfast.errors import UserError
from mmfast.wording import one_of


@dataclass(frozen=True)
class Clip:
    """One sound file.

    Attributes:
        file: its relative name.
        label: a class, a number or several, or None.
        groups: kind -> name.
        split: ours, or "all" where there are none.
    """

    file: str
    label: str | float | tuple[float, ...] | None = None
    groups: dict[str, str] = field(default_factory=dict)
    split: str = "all"


@dataclass(frozen=True)
class Clips:
    """The samples of a folder, by one convention.

    Attributes:
        title: of the convention.
        clips: in order.
        warnings: what was counted.
        targets, label_range: of numbers.
    """

    title: str
    clips: Sequence[Clip]
    warnings: Sequence[str] = ()
    targets: Sequence[str] | None = None
    label_range: tuple[float, float] | None = None


EMODB = re.compile(r"(\d\d)[ab]\d\d([WLEAFTN])[a-f]")
EMODB_EMOTIONS = {
    "W": "anger",
    "L": "boredom",
    "E": "disgust",
    "A": "fear",
    "F": "happiness",
    "T": "sadness",
    "N": "neutral",
}
RAVDESS = re.compile(r"(\d\d)-(\d\d)-(\d\d)-\d\d-\d\d-\d\d-(\d\d)")
RAVDESS_EMOTIONS = dict(
    zip(
        (f"{i:02}" for i in range(1, 9)),
        ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"),
        strict=True,
    )
)
CHANNELS = {"01": "speech", "02": "song"}
VIDEO_ONLY = "02"
# How many files the whole of a corpus has.
WHOLE = {"EmoDB": 535, "RAVDESS speech": 1440, "RAVDESS song": 1012}

IEMOCAP = "IEMOCAP"
EVALUATIONS = "Session*/dialog/EmoEvaluation/*.txt"
TURNS = "Session*/sentences/wav/*/*.wav"
TURN = re.compile(r"\[[\d.]+ - [\d.]+\]\t(\S+)\t(\S+)\t\[([\d.]+), ([\d.]+), ([\d.]+)\]\s*")
TURN_NAME = re.compile(r"(Ses0*(\d+))[FM]_\w+_([FM])\w*")
IEMOCAP_EMOTIONS = {"neu": "neutral", "hap": "happy", "exc": "happy", "sad": "sad", "ang": "angry"}
IEMOCAP_OTHERS = {
    "fru": "frustrated",
    "fea": "fearful",
    "sur": "surprised",
    "dis": "disgusted",
    "oth": "other",
    "xxx": None,  # annotators that do not agree
}
IEMOCAP_COUNTS = {"angry": 1103, "happy": 1636, "neutral": 1708, "sad": 1084}
DIMENSIONS = ("valence", "activation", "dominance")
DIMENSIONS_RANGE = (1.0, 5.0)


def clips_of(source: Source, files: Sequence[str], options: Options, table: str | None = None) -> Clips:
    """The samples among the sound ``files`` (relative names) of a folder, by the first convention that fits.

    Those that a ``table`` in the folder lists, where one is given.

    Raises:
        UserError: none fits, or a table or name is wrong; options that the convention does not have.
    """
    if table is not None:
        found = _listed(source, files, table)
    else:
        answers = (convention(source, files, options) for convention in CONVENTIONS)
        found = next(answer for answer in answers if answer is not None)
    for name in ("labels", "classes"):
        if (value := getattr(options, name)) is not None and found.title != IEMOCAP:
            raise UserError(f"{source.path}: {name} must be left out for {found.title}, got {value!r}")
    if not found.clips:
        raise UserError(f"{source.path}: must hold at least one sample of {found.title}, got none")
    return found


def _manifest(source: Source, files: Sequence[str], options: Options) -> Clips | None:
    found = tables(source)
    if len(found) > 1:
        raise UserError(
            f"{source.path}: must hold one table with a column path, got {', '.join(found)}; "
            "give the right one as the source"
        )
    return _listed(source, files, found[0]) if found else None


def _listed(source: Source, files: Sequence[str], name: str) -> Clips:
    table = read_manifest(source, name)
    clips = [Clip(*row) for row in table.rows]
    unlisted = len(set(files) - {clip.file for clip in clips})
    said = [f"sound files that {name} does not list, left out: {unlisted}"] if unlisted else []
    return Clips(f"listed in {name}", clips, said, ("label",) if table.numbers else None)


def _emodb(source: Source, files: Sequence[str], options: Options) -> Clips | None:
    if (matches := _all_match(source, EMODB, files, "EmoDB")) is None:
        return None
    clips = [
        Clip(file, EMODB_EMOTIONS[match[2]], {"speaker": match[1]})
        for file, match in zip(files, matches, strict=True)
    ]
    return Clips("EmoDB", clips, _incomplete({"EmoDB": len(clips)}))


def _ravdess(source: Source, files: Sequence[str], options: Options) -> Clips | None:
    if (matches := _all_match(source, RAVDESS, files, "RAVDESS")) is None:
        return None
    clips = []
    for file, match in zip(files, matches, strict=True):
        medium, channel, emotion, speaker = match.groups()
        for number, value, known in ((2, channel, CHANNELS), (3, emotion, RAVDESS_EMOTIONS)):
            if value not in known:
                raise UserError(
                    f"{source.path / file}: field {number} of a RAVDESS name must be {one_of(known)}, got {value}"
                )
        if medium != VIDEO_ONLY:
            groups = {"speaker": speaker, "channel": CHANNELS[channel]}
            clips.append(Clip(file, RAVDESS_EMOTIONS[emotion], groups))
    counts = Counter(f"RAVDESS {clip.groups['channel']}" for clip in clips)
    silent = len(files) - len(clips)
    said = [f"files of video only, by their names, left out: {silent}"] if silent else []
    return Clips("RAVDESS", clips, said + _incomplete(counts))


def _all_match(source: Source, pattern: re.Pattern, files: Sequence[str], title: str) -> list | None:
    matches = [pattern.fullmatch(PurePosixPath(file).stem) for file in files]
    found = sum(match is not None for match in matches)
    if 0 < len(files) < 2 * found < 2 * len(files):
        other = next(file for file, match in zip(files, matches, strict=True) if match is None)
        raise UserError(
            f"{source.path}: must have names of {title} in all of its {len(files)} sound files or in few, got "
            f"{found}, but not {other}"
        )
    return matches if files and found == len(files) else None


def _incomplete(counts: dict[str, int]) -> list[str]:
    return [
        f"{title} has {WHOLE[title]} files, here are {n}" for title, n in counts.items() if n != WHOLE[title]
    ]


def _iemocap(source: Source, files: Sequence[str], options: Options) -> Clips | None:
    tables = sorted(p.relative_to(source.path).as_posix() for p in source.path.glob(EVALUATIONS))
    tables = [name for name in tables if not PurePosixPath(name).name.startswith(".")]
    if not tables:
        return None
    wanted, every = options.labels, options.classes is not None
    if wanted not in (None, "all", *DIMENSIONS):
        raise UserError(
            f"{source.path}: labels must be {one_of(DIMENSIONS)} or all of them, or be left out, got {wanted!r}"
        )
    if options.classes not in (None, "all"):
        raise UserError(f"{source.path}: classes must be all, or be left out, got {options.classes!r}")
    turns = _turns(source, tables)
    sounds = {PurePosixPath(file).stem: file for file in files if PurePosixPath(file).match(TURNS)}
    clips, others = [], Counter()
    for name, file in sounds.items():
        emotion, numbers = turns.get(name, (None, None))
        if wanted is not None:
            picked = None if numbers is None else tuple(numbers[i] for i in _columns(wanted))
            label = picked[0] if picked and len(picked) == 1 else picked
        else:
            label = {**IEMOCAP_EMOTIONS, **IEMOCAP_OTHERS}.get(emotion)
            if emotion in IEMOCAP_OTHERS:
                others[emotion] += 1
                if not every:
                    continue
        clips.append(Clip(file, label, _wearer_is_not_speaker(source, file)))
    kinds = ", ".join(f"{emotion} {count}" for emotion, count in sorted(others.items()))
    counts = {
        "sound files of no turn (whole dialogues), left out": len(files) - len(sounds),
        "turns without an evaluation, kept without a label": len(sounds.keys() - turns.keys()),
        "evaluated turns without a sound file, left out": len(turns.keys() - sounds.keys()),
        f"turns of other emotions ({kinds}), left out (--classes all keeps them)": 0
        if every
        else others.total(),
        "turns on which annotators do not agree (xxx), kept without a label": others["xxx"] if every else 0,
    }
    said = [f"{what}: {count}" for what, count in counts.items() if count]
    if wanted is not None:
        low, high = DIMENSIONS_RANGE
        flat = [clip.label if isinstance(clip.label, tuple) else (clip.label,) for clip in clips]
        outside = sum(any(n is not None and not low <= n <= high for n in row) for row in flat)
        if outside:
            said.append(f"labels outside of {low:g} to {high:g}, kept: {outside}")
        targets = [DIMENSIONS[i] for i in _columns(wanted)]
        return Clips(IEMOCAP, clips, said, targets, DIMENSIONS_RANGE)
    here = Counter(clip.label for clip in clips)
    if any(here[emotion] != count for emotion, count in IEMOCAP_COUNTS.items()):
        whole, found = (
            ", ".join(f"{n[emotion]} {emotion}" for emotion in IEMOCAP_COUNTS) for n in (IEMOCAP_COUNTS, here)
        )
        said.append(f"IEMOCAP has {whole} turns, here are {found}")
    return Clips(IEMOCAP, clips, said)


def _columns(labels: str) -> Sequence[int]:
    return range(len(DIMENSIONS)) if labels == "all" else [DIMENSIONS.index(labels)]


def _turns(source: Source, tables: Sequence[str]) -> dict[str, tuple[str, tuple[float, ...]]]:
    """Name of a turn -> its emotion, and the numbers of its three dimensions."""
    turns: dict[str, tuple[str, tuple[float, ...]]] = {}
    for table in tables:
        path = source.file(table)
        try:
            lines = path.read_bytes().decode("utf-8", "replace").splitlines()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        for number, line in enumerate(lines, 1):
            if not line.startswith("["):
                continue
            try:
                name, emotion, *numbers = TURN.fullmatch(line).groups()
                numbers = tuple(map(float, numbers))
            except (AttributeError, ValueError):
                raise UserError(
                    f"{path}: line {number} must be [START - END] NAME EMOTION [VALENCE, ACTIVATION, DOMINANCE] with "
                    f"tabs between, got {line[:80]!r}"
                ) from None
            known = (*IEMOCAP_EMOTIONS, *IEMOCAP_OTHERS)
            if emotion not in known:
                raise UserError(f"{path}: line {number} must name {one_of(known)}, got {emotion[:40]!r}")
            if name in turns:
                raise UserError(
                    f"{path}: line {number} must name a turn for the first time, got {name} again"
                )
            turns[name] = emotion, numbers
    return turns


def _wearer_is_not_speaker(source: Source, file: str) -> dict[str, str]:
    """Groups of a turn: the letter behind the session is that of who wears the markers, the last one who speaks."""
    match = TURN_NAME.fullmatch(PurePosixPath(file).stem)
    if match is None:
        raise UserError(
            f"{source.path / file}: must have a name such as Ses01F_impro01_F000, got {PurePosixPath(file).stem}"
        )
    prefix, session, speaker = match.groups()
    return {"speaker": f"{prefix}{speaker}", "session": session}


def _plain(source: Source, files: Sequence[str], options: Options) -> Clips:
    folders = [PurePosixPath(file).parent.parts for file in files]
    classes = {parts[0] for parts in folders if parts}
    depths = {len(parts) for parts in folders}
    if depths - {0, 1} or len(depths) > 1:
        odd = next(f for f, parts in zip(files, folders, strict=True) if len(parts) == max(depths))
        raise UserError(
            f"{source.path}: must hold one folder for each class with its sound files, got {odd}; a CSV file beside "
            "them with the columns path, label, speaker, session and split says what they are"
        )
    if len(classes) < 2:
        said = ["no classes: the names of the files are of no known corpus"]
        return Clips("no classes", [Clip(file) for file in files], said)
    clips = [Clip(file, parts[0]) for file, parts in zip(files, folders, strict=True)]
    return Clips("one folder for each class", clips)


# Who answers first is right.
CONVENTIONS: tuple[Callable[[Source, Sequence[str], Options], Clips | None], ...] = (
    _manifest,
    _iemocap,
    _emodb,
    _ravdess,
    _plain,
)
