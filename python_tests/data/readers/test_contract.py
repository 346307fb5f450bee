"""What holds for every layout: read exactly, looked at, converted without loss, trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from layouts import Layout, find
from training_help import TINY, assert_same, mmfast

from mmfast.data import MultimodalData, inspect, load

USUAL = ("train", "valid", "test")
SAME = ("name", "task", "targets", "label_range", "aligned", "misaligned", "fingerprint", "groups", "splits")


class Made(NamedTuple):
    row: Layout
    path: Path
    options: dict[str, Any]
    data: MultimodalData

    def flags(self) -> list[str]:
        """The options as flags of `inspect` and `convert`."""
        return [
            f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}")
            for key, value in self.options.items()
        ]


@pytest.fixture(scope="module", params=find(), ids=lambda row: row.name)
def made(request, tmp_path_factory) -> Made:
    row = request.param
    if row.needs:
        pytest.importorskip(row.needs)
    folder = tmp_path_factory.mktemp("layout")
    path = Path(row.write(folder))
    options = {**row.options, **row.options_from(folder)}
    return Made(row, path, options, load(path, **options))


def plain(told) -> Any:
    """Words, a transcript or tokens; None for none at all."""
    return (told if told is None or isinstance(told, str) else list(told)) or None


def test_is_read_exactly(made):
    expected, data = made.row.expected(), made.data
    assert (data.task, tuple(data.targets)) == (expected.task, tuple(expected.targets))
    assert data.label_range == (expected.label_range and tuple(expected.label_range))
    for split in dict.fromkeys((*USUAL, *expected.splits)):
        samples, dataset = expected.splits.get(split, ()), getattr(data, split)
        assert dataset.names == [sample.name for sample in samples], split
        groups = dataset.groups
        beside = {kind: getattr(dataset, kind) for kind in ("words", "transcripts", "tokens")}
        for i, sample in enumerate(samples):
            where = f"{split} {sample.name}"
            assert set(dataset.modalities) == set(sample.values), where
            for modality, values in sample.values.items():
                with np.errstate(over="ignore"):
                    wanted = np.asarray(values, dtype=np.float32)
                got = dataset[i].values[modality].numpy()
                np.testing.assert_array_equal(got, wanted, f"{where} {modality}")
            np.testing.assert_array_equal(dataset.labels[i].numpy(), np.float32(sample.label), where)
            assert {kind: names[i] for kind, names in groups.items()} == dict(sample.groups), where
            told = [plain(items and items[i]) for items in beside.values()]
            assert told == [plain(sample.words), plain(sample.transcript), plain(sample.tokens)], where
    ids = [i for split in USUAL for i in getattr(data, split).ids.tolist()]
    assert ids == list(range(len(ids))), "numbered in the order of the splits"


def test_inspect_counts_what_is_there(made, capsys):
    assert mmfast("inspect", made.path, "--json", *made.flags()) == 0
    told = json.loads(capsys.readouterr().out)
    expected = made.row.expected()
    for split, samples in expected.splits.items():
        if not samples:
            assert split not in told["splits"]
            continue
        found = told["splits"][split]
        assert found["samples"] == len(samples)
        assert found["labelled"] == sum(not np.isnan(s.label).all() for s in samples)
        for modality, facts in found["modalities"].items():
            values = [np.asarray(s.values[modality], dtype=np.float32) for s in samples]
            lengths = [len(v) for v in values if len(v)] or [0]
            assert facts["features"] == values[0].shape[1]
            assert facts["missing"] == pytest.approx(sum(len(v) == 0 for v in values) / len(values))
            assert (facts["lengths"]["min"], facts["lengths"]["max"]) == (min(lengths), max(lengths))
            assert facts["nan"] == sum(int(np.isnan(v).sum()) for v in values)
            assert facts["inf"] == sum(int(np.isinf(v).sum()) for v in values)
    samples = [s for split in USUAL for s in expected.splits.get(split, ())]
    mixed = [s.name for s in samples if len({len(v) for v in s.values.values()} - {0}) > 1]
    assert (told["aligned"], told["misaligned"]) == (not mixed, mixed[:10])
    assert mmfast("inspect", made.path, *made.flags()) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 100 or " " not in line.strip() for line in out.splitlines()[1:])
    assert told["layout"].split(" (")[0] in out


def test_a_round_trip_loses_nothing(made, tmp_path, capsys):
    first, second = tmp_path / "first.mmfast", tmp_path / "second.mmfast"
    assert mmfast("convert", made.path, first, *made.flags()) == 0, capsys.readouterr().err
    assert mmfast("convert", first, second) == 0, capsys.readouterr().err
    assert first.read_bytes() == second.read_bytes()
    before, after = inspect(made.path, **made.options).json(), inspect(first, verify=True).json()
    assert_same({key: before[key] for key in SAME}, {key: after[key] for key in SAME})
    data = load(first)
    assert data.sample_rate == made.data.sample_rate
    for split in USUAL:
        ours, theirs = getattr(made.data, split), getattr(data, split)
        for kind in ("names", "groups", "words", "transcripts"):
            assert_same(getattr(ours, kind), getattr(theirs, kind), f"{split} {kind}")
        assert [*map(list, ours.tokens or [])] == [*map(list, theirs.tokens or [])]
        for kind in ("ids", "labels"):
            np.testing.assert_array_equal(getattr(ours, kind).numpy(), getattr(theirs, kind).numpy(), kind)
        for modality in ours.modalities:
            a, b = (d.flat(modality).numpy().view(np.int32) for d in (ours, theirs))
            np.testing.assert_array_equal(a, b, f"{split} {modality}")


@pytest.mark.rotation
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_step_of_training(made, command, tmp_path, capsys):
    data, parts = made.data, [getattr(made.data, split) for split in USUAL]
    flags = [f"--data.{key}={value}" for key, value in made.options.items()]
    if not all(part.labelled().any() for part in parts):
        flags.append("--data.split=[0.5, 0.25, 0.25]")
    if any(part.unaligned().any() for part in parts):
        if {"modalities", "align"} & made.options.keys():
            pytest.skip("not aligned, and told which modalities to read")
        flags.append(f"--data.modalities={data.modalities[0]}")
    elif unseen := [m for m in data.modalities if not data.train.lengths(m).any()]:
        # What training samples lack throughout has no mean and scale.
        flags.append(f"--data.modalities={','.join(m for m in data.modalities if m not in unseen)}")
    tiny = [flag for flag in TINY if not flag.startswith("--data.")]
    tiny += ["--supervised.epochs=1", "--pretraining.epochs=1", "--pretraining.batch_size=4"]
    tiny += [f"--data.path={made.path}", f"--run.folder={tmp_path / 'run'}"]
    status = mmfast(command, *tiny, *flags)
    error = capsys.readouterr().err
    outside = data.label_range is not None and any(
        ((part.labels < data.label_range[0]) | (part.labels > data.label_range[1])).any() for part in parts
    )
    assert (status, "labels must lie in" in error) == ((2, True) if outside else (0, False)), error
