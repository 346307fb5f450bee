"""Folders of sound files by the names of EmoDB, RAVDESS and IEMOCAP, by a table, and by folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from layouts import Expected, ExpectedSample, Layout

RATE = 16_000


def waves(count: int, shortest: int = 6) -> list[np.ndarray]:
    """(n,) int16 each."""
    generator = np.random.default_rng(12)
    return [generator.integers(-(2**15), 2**15, shortest + i % 5).astype(np.int16) for i in range(count)]


def write_wave(path: Path, wave: np.ndarray, rate: int = RATE) -> None:
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, subtype="PCM_16")


def sample(name, wave, label=float("nan"), groups=None) -> ExpectedSample:
    return ExpectedSample(name, {"speech": wave[:, None] / 32768}, label, groups or {})


# EmoDB: three speakers, four letters.
EMODB = [f"{speaker}a0{i}{letter}a" for speaker in ("03", "08", "10") for i, letter in enumerate("FNTWFN", 1)]
EMODB_CLASSES = {"F": "happiness", "N": "neutral", "T": "sadness", "W": "anger"}
EMODB_TARGETS = ["anger", "happiness", "neutral", "sadness"]


def write_emodb(folder: Path) -> Path:
    for name, wave in zip(EMODB, waves(len(EMODB)), strict=True):
        write_wave(folder / f"emodb/wav/{name}.wav", wave)
    (folder / "emodb/wav/._03a01Fa.wav").write_bytes(b"of another system")
    return folder / "emodb"


def expect_emodb() -> Expected:
    samples = [
        sample(name, wave, EMODB_TARGETS.index(EMODB_CLASSES[name[5]]), {"speaker": name[:2]})
        for name, wave in zip(EMODB, waves(len(EMODB)), strict=True)
    ]
    return Expected({"train": samples}, "classification", EMODB_TARGETS)


# RAVDESS: speech and song of actors 1, 12 and 14, in their folders.
RAVDESS = [
    f"03-{channel}-{emotion}-01-02-01-{actor}"
    for actor in ("01", "12", "14")
    for channel in ("01", "02")
    for emotion in ("01", "04", "06")
]
RAVDESS_TARGETS = ["fearful", "neutral", "sad"]


def write_ravdess(folder: Path) -> Path:
    for name, wave in zip(RAVDESS, waves(len(RAVDESS)), strict=True):
        write_wave(folder / f"ravdess/Actor_{name[-2:]}/{name}.wav", wave, 48_000)
    return folder / "ravdess"


def expect_ravdess() -> Expected:
    samples = [
        sample(
            name,
            wave,
            {"01": 1, "04": 2, "06": 0}[name[6:8]],
            {"speaker": name[-2:], "channel": "speech" if name[3:5] == "01" else "song"},
        )
        for name, wave in zip(RAVDESS, waves(len(RAVDESS)), strict=True)
    ]
    return Expected({"train": samples}, "classification", RAVDESS_TARGETS)


# IEMOCAP: the letter behind the session is the same for both speakers of a dialogue.
CODES = ["neu", "hap", "exc", "sad", "ang", "fru", "xxx"]
TURNS = [
    (f"Ses0{session}F_impro01", f"Ses0{session}F_impro01_{speaker}{i:03}", CODES[i], 1.5 + 0.5 * i)
    for session in (1, 2)
    for speaker in "FM"
    for i in range(7)
]


def write_iemocap(folder: Path) -> Path:
    root = folder / "iemocap"
    lines: dict[str, list[str]] = {}
    for (dialogue, turn, code, valence), wave in zip(TURNS, waves(28), strict=True):
        session = root / f"Session{dialogue[4]}"
        write_wave(session / f"sentences/wav/{dialogue}/{turn}.wav", wave)
        lines.setdefault(dialogue, []).append(
            f"[6.2901 - 8.2357]\t{turn}\t{code}\t[{valence:.4f}, 2.5000, 3.0000]\n"
            "C-E1:\tNeutral;\t()\nA-F1:\tval 3; act 2; dom  2;\t()\n\n"
        )
    for dialogue, text in lines.items():
        tables = root / f"Session{dialogue[4]}/dialog/EmoEvaluation"
        (tables / "Categorical").mkdir(parents=True)
        (tables / f"{dialogue}.txt").write_text(
            "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n" + "".join(text)
        )
        (tables / f"._{dialogue}.txt").write_bytes(b"\x00\x05\x16\x07")
        (tables / f"Categorical/{dialogue}_e1_cat.txt").write_text(f"{dialogue}_F000 :Neutral; ()\n")
        write_wave(root / f"Session{dialogue[4]}/dialog/wav/{dialogue}.wav", np.zeros(9, np.int16))
    return root


def turn_groups(turn: str) -> dict[str, str]:
    return {"speaker": turn[:5] + turn.rpartition("_")[2][0], "session": turn[4]}


def expect_iemocap() -> Expected:
    targets = ["angry", "happy", "neutral", "sad"]
    index = {"neu": 2, "hap": 1, "exc": 1, "sad": 3, "ang": 0}
    samples = [
        sample(turn, wave, index[code], turn_groups(turn))
        for (_, turn, code, _), wave in zip(TURNS, waves(28), strict=True)
        if code in index
    ]
    return Expected({"train": samples}, "classification", targets)


def expect_valence() -> Expected:
    samples = [
        sample(turn, wave, valence, turn_groups(turn))
        for (_, turn, _, valence), wave in zip(TURNS, waves(28), strict=True)
    ]
    return Expected({"train": samples}, "regression", ["valence"], (1, 5))


# Tables: classes with splits, numbers without.
SPLITS = ["train"] * 8 + ["dev"] * 3 + ["test"] * 3


def write_table(folder: Path) -> Path:
    rows = ["path,label,split,speaker"]
    for i, (split, wave) in enumerate(zip(SPLITS, waves(14), strict=True)):
        write_wave(folder / f"table/sounds/clip{i:02}.flac", wave)
        rows.append(f'sounds/clip{i:02}.flac,{"calm" if i % 2 else "tense"},{split},"Smith, {i % 3}"')
    (folder / "table/list.csv").write_text("\n".join(rows))
    return folder / "table"


def expect_table() -> Expected:
    splits: dict[str, list[ExpectedSample]] = {}
    for i, (split, wave) in enumerate(zip(SPLITS, waves(14), strict=True)):
        split = "valid" if split == "dev" else split
        found = sample(f"clip{i:02}", wave, (i + 1) % 2, {"speaker": f"Smith, {i % 3}"})
        splits.setdefault(split, []).append(found)
    return Expected(splits, "classification", ["calm", "tense"])


def write_numbers(folder: Path) -> Path:
    rows = ["label\tpath"]
    for i, wave in enumerate(waves(12)):
        write_wave(folder / f"numbers/clip{i:02}.wav", wave)
        rows.append(f"{i / 4 - 1.5 if i != 3 else ''}\tclip{i:02}.wav")
    table = folder / "numbers/list.tsv"
    table.write_text("\ufeff" + "\r\n".join(rows) + "\r\n")
    return table


def expect_numbers() -> Expected:
    samples = [
        sample(f"clip{i:02}", wave, i / 4 - 1.5 if i != 3 else float("nan"))
        for i, wave in enumerate(waves(12))
    ]
    return Expected({"train": samples}, "regression", ["label"], (-3, 3))


def write_plain(folder: Path) -> Path:
    for i, wave in enumerate(waves(12)):
        write_wave(folder / f"plain/{'Calm' if i % 2 else 'angry'}/{i // 2}.wav", wave)
    return folder / "plain"


def expect_plain() -> Expected:
    order = [*range(1, 12, 2), *range(0, 12, 2)]
    samples = [
        sample(f"{'Calm' if i % 2 else 'angry'}/{i // 2}.wav", waves(12)[i], (i + 1) % 2) for i in order
    ]
    return Expected({"train": samples}, "classification", ["Calm", "angry"])


def row(name, write, expected, **options) -> Layout:
    return Layout(f"sound, {name}", write, expected, options, needs="soundfile")


LAYOUTS = [
    row("EmoDB", write_emodb, expect_emodb),
    row("RAVDESS", write_ravdess, expect_ravdess),
    row("IEMOCAP", write_iemocap, expect_iemocap),
    row("IEMOCAP valence", write_iemocap, expect_valence, labels="valence"),
    row("table", write_table, expect_table),
    row("table of numbers", write_numbers, expect_numbers),
    row("a folder each class", write_plain, expect_plain),
]
