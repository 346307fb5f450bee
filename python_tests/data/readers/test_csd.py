"""CMU-MultimodalSDK's files: roles, segments, alignment by time, folds, and what is wrong with them."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from layouts import csd as layout
from layouts.csd import write_labels, write_sequence

from mmfast.data import load
from mmfast.data.readers import csd, folds, intervals
from mmfast.data.readers.folds import standard_folds
from mmfast.data.source import Source
from mmfast.errors import UserError

SHARED = Path(os.environ.get("MMFAST_SHARED", Path(__file__).parents[4] / "shared"))
REAL = SHARED / "data" / "mosi_csd"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real CMU-MOSI file is not here")


@pytest.fixture
def folder(tmp_path):
    return layout.write(tmp_path)


def naive(spans, rows):
    return [
        [j for j, r in enumerate(rows) if min(s[1], r[1]) - max(s[0], r[0]) > intervals.TOUCH] for s in spans
    ]


@pytest.mark.parametrize("together", [1, 7, 10**6])
def test_overlaps_and_their_means_are_those_of_every_pair(monkeypatch, together):
    monkeypatch.setattr(intervals, "TOGETHER", together)
    rng = np.random.default_rng(0)
    for n, m in [(0, 3), (3, 0), (1, 1), (30, 20), (60, 5)]:
        start = np.sort(rng.uniform(0, 10, n))
        rows = np.stack([start, start + rng.choice([0.1, 0.5, 9.0], n)], 1)
        first = rng.uniform(-1, 11, m).round(1)
        spans = np.stack([first, first + rng.choice([0.0, 0.3, 3.0, -1.0], m)], 1)
        want, values = naive(spans, rows), rng.normal(size=(n, 3)).astype("f4")
        counts, index = intervals.overlapping(spans, rows)
        assert counts.tolist() == [len(w) for w in want] and index.tolist() == [j for w in want for j in w]
        found = intervals.averages(spans, rows, values)
        assert found.shape == (m, 3) and found.dtype == np.float32
        for mean, w in zip(found, want, strict=True):
            assert np.isnan(mean).all() if not w else np.allclose(mean, values[w].mean(0), atol=1e-6)


def test_what_only_touches_does_not_overlap():
    rows = np.array([[0, 1], [1, 2], [2, 3], [2.999995, 4]])
    assert intervals.overlapping(np.array([[1.0, 2.0], [2.0, 3.0]]), rows)[1].tolist() == [1, 2]


def test_an_hour_of_frames_is_averaged_at_once():
    frames = np.arange(360_000) * 0.01
    rows, words = np.stack([frames, frames + 0.01], 1), np.arange(10_000) * 0.36
    start = time.monotonic()
    found = intervals.averages(np.stack([words, words + 0.36], 1), rows, np.ones((len(rows), 74), "f4"))
    assert (found == 1).all() and time.monotonic() - start < 5


def test_rows_that_all_lie_over_one_another_are_refused_in_time():
    rows = np.stack([np.zeros(100_000), np.full(100_000, 9.0)], 1)
    with pytest.raises(ValueError, match="too many intervals lie over one another"):
        intervals.overlapping(rows, rows)


def test_folder_files_in_it_and_a_single_file_are_listed(folder):
    (folder / "notes.txt").write_text("hello")
    (folder / "more").mkdir()
    found = csd.contents(Source(folder))
    assert ("COVAREP.csd:COVAREP/data, 4 videos", (180, 3), "float32") in found and len(found) == 5
    assert csd.contents(Source(folder / "COVAREP.csd")) == [
        ("COVAREP.csd:COVAREP/data, 4 videos", (180, 3), "float32")
    ]


def test_two_files_of_one_kind_are_named_and_chosen_between(folder):
    write_sequence(folder, "OpenSMILE", {v: layout.rows("visual", v) for v in layout.VIDEOS})
    with pytest.raises(
        UserError, match="audio must be one file, got COVAREP, OpenSMILE; say which"
    ) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    data = load(folder, modalities="text,audio=opensmile")
    assert data.modalities == ("text", "audio") and data.features["audio"] == 2
    with pytest.raises(UserError, match=r"audio must be one of .*COVAREP, .*, got 'MFCC'"):
        load(folder, modalities="audio=MFCC")
    with pytest.raises(UserError, match="modalities must be among audio, text, visual, got 'speech'"):
        load(folder, modalities="speech,text,visual,audio=COVAREP")


def test_files_of_no_known_kind_are_left_out_with_a_word_and_phones_without(folder):
    write_sequence(folder, "heartbeat", {v: layout.rows("visual", v) for v in layout.VIDEOS})
    write_sequence(folder, "phones", {v: layout.words(v) for v in layout.VIDEOS})
    data = load(folder)
    assert data.modalities == ("text", "audio", "visual")
    assert [w for w in data.warnings if "heartbeat" in w] and not [w for w in data.warnings if "phones" in w]
    assert load(folder, modalities="audio,pulse=heartbeat").modalities == ("audio", "pulse")


def test_a_video_that_a_file_lacks_is_missing_and_one_that_all_lack_is_counted(folder):
    with h5py.File(folder / "COVAREP.csd", "r+") as file:
        del file["COVAREP/data/-v1_"]
    for root in (*layout.ROOTS.values(), "words"):
        with h5py.File(folder / f"{root}.csd", "r+") as file:
            del file[f"{root}/data/-v2_"]
    for options in ({}, {"align": "text"}):
        data = load(folder, **options)
        assert "1 videos of which no other file knows are left out with their segments" in data.warnings
        assert sorted(set(data.train.groups["video"])) == ["-v0_", "-v1_", "-v3_"]
        lengths = dict(zip(data.train.names, data.train.lengths("audio").tolist(), strict=True))
        assert [n for name, n in lengths.items() if name.startswith("-v1_")] == [0] * 5
        assert min(n for name, n in lengths.items() if not name.startswith("-v1_")) > 0


def test_segments_without_a_word_are_kept_and_counted(folder):
    for root in ("glove_vectors", "words"):
        with h5py.File(folder / f"{root}.csd", "r+") as file:
            at = file[f"{root}/data/-v0_"]
            keep = at["intervals"][:, 1] <= 3
            for name in ("intervals", "features"):
                kept = at[name][keep]
                del at[name]
                at[name] = kept
    data = load(folder, align="text")
    assert len(data.train) == 18 and data.train.names[3] == "-v0_[3]"
    assert [int(data.train.lengths(m)[3]) for m in data.modalities] == [0, 0, 0]
    assert "1 of 18 segments have no word; kept" in data.warnings
    assert "1 segments have no row of glove_vectors, and so no step; kept" in data.warnings
    assert load(folder).train.lengths("audio")[3] == 10


def test_steps_without_a_row_are_no_numbers(folder):
    with h5py.File(folder / "FACET_4.2.csd", "r+") as file:
        times = file["FACET_4.2/data/-v0_/intervals"]
        times[:2] = times[:2] + 1000  # of 0.0 to 0.4 s
    data = load(folder, align="text")
    assert np.isnan(data.train[0].values["visual"]).all(1).tolist() == [True, False, False, False]


def test_words_stand_in_for_text_as_steps(folder):
    (folder / "glove_vectors.csd").unlink()
    for align in ("text", "words"):
        data = load(folder, align=align)
        assert data.modalities == ("audio", "visual") and data.train.lengths("audio").tolist() == [4] * 18
        assert [len(w) for w in data.train.words] == [4] * 18
    with pytest.raises(UserError, match="align must be one of audio, visual, words, got 'speech'"):
        load(folder, align="speech")


def test_intervals_that_do_not_last_are_skipped_and_counted(folder):
    with h5py.File(folder / "COVAREP.csd", "r+") as file:
        times = file["COVAREP/data/-v0_/intervals"]
        times[3], times[4] = (0.3, 0.3), (0.5, 0.4)
    data = load(folder)
    assert "COVAREP: 2 intervals that end no later than they start, skipped" in data.warnings
    assert data.train.lengths("audio")[:2].tolist() == [8, 10]


def replace(folder, root, key, value):
    with h5py.File(folder / f"{root}.csd", "r+") as file:
        del file[f"{root}/{key}"]
        if value is not None:
            file[f"{root}/{key}"] = value


BAD = [
    (lambda f: replace(f, "COVAREP", "data/-v0_/intervals", None), "-v0_ must hold intervals, got none"),
    (lambda f: replace(f, "COVAREP", "data/-v0_/features", None), "-v0_ must hold features, got none"),
    (
        lambda f: replace(f, "COVAREP", "data/-v0_/intervals", np.full((40, 2), np.nan)),
        "intervals must be finite, got",
    ),
    (
        lambda f: replace(f, "COVAREP", "data/-v0_/intervals", np.ones((40, 3))),
        "intervals must be (n, 2) seconds",
    ),
    (lambda f: replace(f, "COVAREP", "data/-v0_/intervals", np.ones((39, 2))), "features must have 39 rows"),
    (
        lambda f: replace(f, "COVAREP", "data/-v0_/intervals", np.full((40, 2), b"a")),
        "intervals must be (n, 2)",
    ),
    (
        lambda f: replace(f, "COVAREP", "data/-v1_/features", np.ones((50, 2))),
        "must have 3 features in all videos",
    ),
    (
        lambda f: replace(f, "COVAREP", "data/-v1_/features", np.full((50, 3), b"a")),
        "must be numbers as in other",
    ),
    (lambda f: (f / "COVAREP.csd").write_bytes(b""), "COVAREP.csd: must be HDF5 as its name says"),
    (
        lambda f: (f / "COVAREP.csd").write_bytes((f / "COVAREP.csd").read_bytes()[:999]),
        "not a readable HDF5 file",
    ),
    (
        lambda f: replace(f, "COVAREP", "data/-v0_", h5py.ExternalLink("/etc/passwd", "/")),
        "must lie in the file itself, got an external link",
    ),
    (lambda f: (f / "Opinion Segment Labels.csd").unlink(), "must hold labels, whose rows are the segments"),
]


@pytest.mark.parametrize(("damage", "message"), BAD)
def test_bad_files_give_one_sentence(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path):
    (folder / "COVAREP.csd").rename(tmp_path / "outside.csd")
    (folder / "COVAREP.csd").symlink_to(tmp_path / "outside.csd")
    with pytest.raises(UserError, match=r"COVAREP\.csd: must stay inside its folder"):
        load(folder)


def test_labels_are_chosen_by_name_and_named_by_the_file(tmp_path):
    folder = layout.write(tmp_path, 3)
    assert load(folder).targets == ("label0", "label1", "label2") and load(folder).train.labels.shape == (
        18,
        3,
    )
    (folder / "All Labels.csd").unlink()
    write_labels(folder, 3, {"dimension names": ["mood", "force", "speed"]})
    data = load(folder)
    assert data.targets == ("mood", "force", "speed")
    assert load(folder, labels="force").train.labels.tolist() == data.train.labels[:, 1].tolist()
    with pytest.raises(UserError, match="labels must be one of all, mood, force, speed, got 'anger'"):
        load(folder, labels="anger")


def test_all_seven_labels_of_mosei_are_had_for_the_asking(tmp_path):
    data = load(layout.write(tmp_path, 7), labels="all")
    assert data.targets == ("sentiment", *layout.EMOTIONS) and data.train.labels.shape == (18, 7)


def test_metadata_that_are_no_json_do_no_harm(folder):
    with h5py.File(folder / "Opinion Segment Labels.csd", "r+") as file:
        file["Opinion Segment Labels/metadata/dimension names"] = np.array(["[" * 100_000], object)
        file["Opinion Segment Labels/metadata/dataset name"][0] = "{"
    assert load(folder).name in ("{", "corpus")


def test_folds_hold_every_video_once():
    sizes = {
        "cmu_mosi": (52, 10, 31),
        "pom": (600, 100, 203),
        "social_iq": (888, 127, 0),
        "cmu_mosei": (2249, 300, 678),
    }
    for name in folds.TITLES:
        listed = folds._lists(name)
        counts = [list(listed.values()).count(split) for split in ("train", "valid", "test")]
        assert tuple(counts) == sizes[name] and sum(counts) == len(listed)
        content = json.loads((Path(folds.__file__).parent / f"{name}.json").read_text())
        assert sum(map(len, content.values())) == len(listed)
        assert standard_folds(listed)[0] == folds.TITLES[name]


def test_folds_are_used_for_most_of_their_videos_alone(folder):
    videos = sorted(folds._lists("cmu_mosi"))
    assert standard_folds([*videos[:95], *"abcd"][:97])[0] == "CMU-MOSI"
    assert standard_folds([*videos[:90], *(f"x{i}" for i in range(10))]) is None
    assert standard_folds([]) is None


@needs_real
def test_the_real_file_of_labels_is_listed_and_refused_as_such():
    assert csd.contents(Source(REAL)) == [
        ("CMU_MOSI_Opinion_Labels.csd:Opinion Segment Labels/data, 93 videos", (2199, 1), "float32")
    ]
    with pytest.raises(
        UserError, match=r"holds labels only \(Opinion Segment Labels: 93 videos, 2,199 segments\)"
    ):
        load(REAL)


@needs_real
def test_the_real_segments_are_all_kept_in_the_standard_folds(tmp_path):
    path = shutil.copy(REAL / "CMU_MOSI_Opinion_Labels.csd", tmp_path / "labels.csd")
    os.chmod(path, 0o644)
    with h5py.File(path) as file:
        root = file["Opinion Segment Labels/data"]
        ends = {video: root[video]["intervals"][:].max() for video in root}
        wanted = {f"{v}[{i}]": x for v in root for i, x in enumerate(root[v]["features"][:, 0].tolist())}
    for root, step in (("glove_vectors", 0.5), ("COVAREP", 0.2)):
        videos = {}
        for video, end in ends.items():
            start = np.arange(0, end, step)
            videos[video] = np.stack([start, start + step], 1), start[:, None].astype("f4")
        write_sequence(tmp_path, root, videos)
    data = load(tmp_path, align="text")
    assert [len(d) for d in (data.train, data.valid, data.test)] == [1284, 229, 686]
    assert "split by the standard folds of CMU-MOSI" in data.warnings
    assert data.name == "CMU-MOSI" and data.label_range == (-3, 3) and data.targets == ("sentiment score",)
    for split in (data.train, data.valid, data.test):
        assert dict(zip(split.names, split.labels.tolist(), strict=True)).items() <= wanted.items()
    # One of them ends before it starts.
    assert sum(int((d.lengths("text") == 0).sum()) for d in (data.train, data.valid, data.test)) == 1
    assert "1 segments end no later than they start, and so have no step; kept" in data.warnings
