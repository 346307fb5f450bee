"""What is special to folders of sound files; that each layout is read exactly stands with all layouts."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
import torch
from layouts import sound as layouts
from training_help import mmfast

from mmfast.data import load, save
from mmfast.data.readers import sound as reader
from mmfast.data.resample import resample
from mmfast.data.source import Source
from mmfast.data.spectrogram import spectrogram
from mmfast.errors import UserError

soundfile = pytest.importorskip("soundfile")


def write(path, wave, rate=16_000, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, **options)


def noise(n, seed=0):
    return np.random.default_rng(seed).uniform(-0.9, 0.9, n).astype(np.float32)


def refused(path, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=lambda layout: layout.name)
def test_layouts_are_read_exactly(layout, tmp_path):
    data, expected = load(layout.write(tmp_path), **layout.options), layout.expected()
    assert (data.task, data.targets) == (expected.task, tuple(expected.targets))
    if expected.label_range:
        assert data.label_range == tuple(expected.label_range)
    assert data.splits().keys() == expected.splits.keys()
    for split, samples in expected.splits.items():
        dataset = getattr(data, split)
        assert dataset.names == [s.name for s in samples]
        np.testing.assert_array_equal(dataset.labels.numpy(), np.float32([s.label for s in samples]))
        for i, wanted in enumerate(samples):
            np.testing.assert_array_equal(
                dataset[i].values["speech"].numpy(), np.float32(wanted.values["speech"])
            )
            assert {kind: names[i] for kind, names in dataset.groups.items()} == wanted.groups


def test_classes_that_are_left_out_by_custom_can_be_kept(tmp_path):
    path = layouts.write_iemocap(tmp_path)
    data = load(path)
    assert "turns of other emotions (fru 4, xxx 4), left out (--classes all keeps them): 8" in data.warnings
    assert "sound files of no turn (whole dialogues), left out: 2" in data.warnings
    assert any(text.startswith("IEMOCAP has 1103 angry, 1636 happy") for text in data.warnings)
    data = load(path, classes="all")
    assert len(data.train) == 28 and data.targets == ("angry", "frustrated", "happy", "neutral", "sad")
    assert int(data.train.labelled().sum()) == 24
    assert "turns on which annotators do not agree (xxx), kept without a label: 4" in data.warnings
    every = load(path, labels="all")
    assert every.targets == ("valence", "activation", "dominance")
    assert every.train.labels[1].tolist() == [2.0, 2.5, 3.0]
    assert "labels must be one of valence, activation, dominance" in refused(path, labels="anger")
    assert "classes must be all" in refused(path, classes="four")


def test_turns_without_their_other_half_are_counted(tmp_path):
    path = layouts.write_iemocap(tmp_path)
    folder = path / "Session1/sentences/wav/Ses01F_impro01"
    (folder / "Ses01F_impro01_F000.wav").rename(folder / "Ses01F_impro01_F099.wav")
    data = load(path)
    assert "turns without an evaluation, kept without a label: 1" in data.warnings
    assert "evaluated turns without a sound file, left out: 1" in data.warnings
    assert torch.isnan(data.train.labels[data.train.names.index("Ses01F_impro01_F099")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[6.29 - 8.23]\tSes01F_impro01_F000\tneu", "line 1 must be [START - END] NAME EMOTION"),
        ("[6.29 - 8.23]\tSes01F_impro01_F000\tjoy\t[2.5, 2.5, 2.5]", "line 1 must name one of neu, hap,"),
        ("[6.29 - 8.23]\tSes01F_impro01_F000\tneu\t[2.5.1, 2.5, 2.5]", "line 1 must be [START - END]"),
    ],
)
def test_evaluations_that_are_none_are_refused(tmp_path, line, message):
    path = layouts.write_iemocap(tmp_path)
    (path / "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt").write_text(line)
    assert message in refused(path)


def test_names_that_are_not_quite_those_of_a_corpus(tmp_path):
    path = layouts.write_emodb(tmp_path)
    write(path / "wav/extra.wav", noise(9))
    assert (
        "must have names of EmoDB in all of its 19 sound files or in few, got 18, but not wav/extra"
        in refused(path)
    )
    path = layouts.write_ravdess(tmp_path)
    write(path / "Actor_01/03-01-09-01-01-01-01.wav", noise(9))
    assert "field 3 of a RAVDESS name must be one of 01, 02," in refused(path)
    (path / "Actor_01/03-01-09-01-01-01-01.wav").rename(path / "Actor_01/02-01-08-01-01-01-01.wav")
    data = load(path)
    assert "files of video only, by their names, left out: 1" in data.warnings
    assert "RAVDESS speech has 1440 files, here are 9" in data.warnings


def test_rates_that_differ_are_refused_or_resampled(tmp_path):
    a, b = noise(300), noise(441, 1)
    write(tmp_path / "x/a.wav", a, 16_000, subtype="FLOAT")
    write(tmp_path / "x/b.wav", a, 16_000, subtype="FLOAT")
    write(tmp_path / "y/c.wav", b, 44_100, subtype="FLOAT")
    assert refused(tmp_path).endswith("y/c.wav: has 44100 Hz, others 16000: --rate 16000 resamples")
    data = load(tmp_path, rate=16_000)
    assert data.sample_rate == 16_000 and "files resampled to 16000 Hz: 1" in data.warnings
    assert torch.equal(data.train[0].values["speech"][:, 0], torch.from_numpy(a))
    np.testing.assert_array_equal(data.train[2].values["speech"][:, 0].numpy(), resample(b, 44_100, 16_000))
    for rate in (0, 3999, 10**9):
        assert "rate must be in [4000, 384000]" in refused(tmp_path, rate=rate)


def test_spectrograms_are_of_16_khz(tmp_path):
    a, b = noise(1000), noise(2000, 1)
    write(tmp_path / "x/a.wav", a, 16_000, subtype="FLOAT")
    write(tmp_path / "y/b.wav", b, 48_000, subtype="FLOAT")
    data = load(tmp_path, spectrogram=True)
    assert data.features == {"speech": 257} and data.train.lengths("speech").tolist() == [7, 5]
    for i, wave in enumerate((a, resample(b, 48_000, 16_000))):
        assert torch.equal(data.train[i].values["speech"], spectrogram(torch.from_numpy(wave)))
    assert "rate must be 16000 for spectrograms" in refused(tmp_path, spectrogram=True, rate=8000)


def test_channels_are_averaged_and_silence_is_missing(tmp_path):
    stereo = np.stack([noise(50), noise(50, 1)], 1)
    write(tmp_path / "x/a.wav", stereo, subtype="FLOAT")
    write(tmp_path / "y/b.wav", np.zeros(0))
    data = load(tmp_path)
    np.testing.assert_array_equal(data.train[0].values["speech"][:, 0].numpy(), stereo.mean(1))
    assert data.train.lengths("speech").tolist() == [50, 0]
    assert "files of several channels, of which the mean was taken: 1" in data.warnings
    assert "files without any sound, kept as missing: 1" in data.warnings


def test_numbers_that_are_none_stay(tmp_path):
    wave = np.array([0.5, np.nan, np.inf, 2.0], np.float32)
    write(tmp_path / "a.wav", wave, subtype="FLOAT")
    np.testing.assert_array_equal(load(tmp_path).train[0].values["speech"][:, 0].numpy(), wave)


def test_long_files_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "BLOCK", 7)
    write(tmp_path / "a.flac", noise(100), subtype="PCM_16")
    whole, _ = soundfile.read(tmp_path / "a.flac", dtype="float32")
    np.testing.assert_array_equal(load(tmp_path).train[0].values["speech"][:, 0].numpy(), whole)


def test_folders_that_say_no_class(tmp_path):
    write(tmp_path / "one/a.wav", noise(9))
    assert load(tmp_path / "one").layout == "sound files (no classes)"
    assert not load(tmp_path).train.labelled().any()
    write(tmp_path / "one/happy/b.wav", noise(9))
    message = refused(tmp_path)
    assert (
        "must hold one folder for each class with its sound files, got one/happy/b.wav; a CSV file" in message
    )


def test_contents_come_from_headers_alone(tmp_path, monkeypatch):
    write(tmp_path / "x/a.wav", noise(30), 22_050, subtype="PCM_16")
    write(tmp_path / "y/b.wav", noise(20), 22_050, subtype="PCM_24")
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    assert reader.contents(Source(tmp_path)) == [
        ("x/a.wav", (30, 1), "PCM_16 22050 Hz"),
        ("y/b.wav", (20, 1), "PCM_24 22050 Hz"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "path\n../x.wav",
            "line 2: path must be relative to the table and stay in its folder, got '../x.wav'",
        ),
        ("path\nin/../../x.wav", "stay in its folder, got 'in/../../x.wav'"),
        ("path\n/etc/hostname", "stay in its folder, got '/etc/hostname'"),
        ("path\n", "must hold at least one sample"),
        ("path\nnowhere.wav", "nowhere.wav: no such file"),
        ("path,label\na.wav,1,2", "line 2 must have 2 cells as the header, got 3"),
        ("path,label\na.wav,inf", "label must be finite, got inf for a.wav"),
        ("path,split\na.wav,later", "split must be one of train, "),
        ("path,path\na.wav,a.wav", "columns must have names, each its own, got 'path'"),
        ("path\na.wav\nin/../a.wav", "line 3: path must be listed once"),
        ('path\n"a.wav', "must be a table with a header and as many cells in each line"),
        ("path\na\0.wav", "list.csv"),
        ("path\nlink.wav", "link.wav: must stay inside its folder"),
        ("path\nlist.csv", "must be a WAV, FLAC or Ogg file, got one that starts with 70 61 74 68"),
        ("path\nfifo.wav", "fifo.wav: must be a regular file, got a FIFO"),
    ],
)
def test_tables_lead_nowhere_else(tmp_path, text, message):
    folder = tmp_path / "corpus"
    write(folder / "a.wav", noise(9))
    write(tmp_path / "x.wav", noise(9))
    (folder / "link.wav").symlink_to(tmp_path / "x.wav")
    os.mkfifo(folder / "fifo.wav")
    (folder / "list.csv").write_text(text)
    assert message in refused(folder)
    assert message in refused(folder / "list.csv")


def test_a_table_that_is_no_text(tmp_path):
    write(tmp_path / "a.wav", noise(9))
    (tmp_path / "list.csv").write_bytes(b"path,label\na.wav,\xff\xfe")
    assert "must be text in UTF-8, got the bytes ff fe" in refused(tmp_path)


def test_several_tables_and_files_that_none_lists(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.wav", noise(9))
        (tmp_path / f"{name}.csv").write_text(f"path\n{name}.wav\n")
    assert "must hold one table with a column path, got a.csv, b.csv" in refused(tmp_path)
    assert load(tmp_path / "b.csv").train.names == ["b"]
    (tmp_path / "b.csv").unlink()
    assert "sound files that a.csv does not list, left out: 1" in load(tmp_path).warnings


def test_links_that_leave_the_folder_are_refused(tmp_path):
    write(tmp_path / "elsewhere/b.wav", noise(9))
    write(tmp_path / "corpus/a.wav", noise(9))
    (tmp_path / "corpus/more").symlink_to(tmp_path / "elsewhere")
    assert "linked folders, not followed: 1" in load(tmp_path / "corpus").warnings
    (tmp_path / "corpus/b.wav").symlink_to(tmp_path / "elsewhere/b.wav")
    assert "corpus/b.wav: must stay inside its folder" in refused(tmp_path / "corpus")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert len(load(tmp_path / "link").train) == 1


def riff(rate=16_000, claimed=40, data=b"\0" * 40):
    chunk = (
        b"fmt "
        + struct.pack("<IHHIIHH", 16, 1, 1, rate, rate * 2, 2, 16)
        + b"data"
        + struct.pack("<I", claimed)
    )
    return b"RIFF" + struct.pack("<I", (4 + len(chunk) + claimed) % 2**32) + b"WAVE" + chunk + data


HOSTILE = {
    "4 GiB and 0 Hz": (
        riff(0, 2**32 - 1),
        "must hold the 4294967295 bytes of sound that its header says, got 40",
    ),
    "4 GiB": (riff(16_000, 2**32 - 1), "must hold the 4294967295 bytes"),
    "0 Hz": (riff(0), "Hz, got 0|not a readable sound file"),
    "2 GHz": (riff(2**31 - 1), "must have a rate of 4000 to 384000 Hz"),
    "1 Hz": (riff(1), "must have a rate of 4000 to 384000 Hz"),
    "empty": (b"", "must be a sound file, got an empty file"),
    "text": (
        b"hello world, hello world",
        "must be a WAV, FLAC or Ogg file, got one that starts with 68 65 6c 6c",
    ),
    "header alone": (riff()[:30], "not a readable sound file, truncated or damaged"),
    "another kind": (b".snd" + b"\0" * 60, "must be a WAV, FLAC or Ogg file"),
    "chunks": (
        b"RIFF\xff\xff\0\0WAVE" + b"LIST\0\0\0\0" * 10_001,
        "must have its data among the first 10000 chunks",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_damaged_and_hostile_files_are_refused(tmp_path, kind):
    content, message = HOSTILE[kind]
    (tmp_path / "a.wav").write_bytes(content)
    found = refused(tmp_path)
    assert any(part in found for part in message.split("|")) and str(tmp_path / "a.wav") in found


def test_compressed_files_claim_no_more_than_they_hold(tmp_path):
    write(tmp_path / "a.flac", noise(5000), subtype="PCM_16")
    content = bytearray((tmp_path / "a.flac").read_bytes())
    # The last 36 bits before the checksum of the first block are the number of samples.
    content[21] |= 0x0F
    content[22:26] = b"\xff" * 4
    (tmp_path / "a.flac").write_bytes(content)
    assert "must hold at most" in refused(tmp_path)
    content[21] &= 0xF0
    content[22:26] = (6000).to_bytes(4, "big")
    (tmp_path / "a.flac").write_bytes(content)
    found = refused(tmp_path)
    assert "must hold 6000 samples as its header says" in found or "truncated or damaged" in found


def test_spectrograms_are_trained_on(tmp_path):
    for i in range(12):
        write(tmp_path / f"corpus/{'calm' if i % 2 else 'tense'}/{i}.wav", noise(700 + 160 * i, i))
    data = load(tmp_path / "corpus", spectrogram=True)
    save(data, tmp_path / "speech.npz")
    settings = (
        "--model.hidden=4",
        "--model.projector=[8, 8]",
        "--run.accelerator=cpu",
        "--run.tensorboard=false",
    )
    short = ("--pretraining.epochs=1", "--pretraining.batch_size=4", f"--run.folder={tmp_path / 'run'}")
    assert mmfast("pretrain", f"--data.path={tmp_path / 'speech.npz'}", *settings, *short) == 0


def test_waveforms_too_long_for_an_encoder_are_told_of(tmp_path):
    write(tmp_path / "a.wav", noise(10_001))
    assert any(text.endswith("(--spectrogram: 100 a second): 10001") for text in load(tmp_path).warnings)
    assert not any("--spectrogram" in text for text in load(tmp_path, spectrogram=True).warnings)
