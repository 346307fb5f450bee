"""Several sources made one corpus, and a pool beside them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmfast.data import MultimodalData, MultimodalDataset, load, save
from mmfast.errors import UserError


def part(n, first, labels=True, modalities=("text", "audio"), size=2, speakers=2):
    return MultimodalDataset(
        {
            m: [np.full((1 + i % 3, size), first + i + k / 10) for i in range(n)]
            for k, m in enumerate(modalities)
        },
        [float(i % 3 - 1) for i in range(n)] if labels else None,
        ids=range(first, first + n),
        names=[f"clip {i}" for i in range(n)],
        groups={"speaker": [str(i % speakers) for i in range(n)]} if speakers else None,
    )


def source(offset=0, **how):
    splits = {
        "train": part(6, offset, **how),
        "valid": part(2, offset + 6, **how),
        "test": part(3, offset + 8, **how),
    }
    return MultimodalData(**splits, label_range=(-3, 3), name="corpus")


@pytest.fixture
def saved(tmp_path):
    def write(name, data):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(data, tmp_path / name)
        return tmp_path / name

    return write


def ids(dataset):
    return dataset.ids.tolist()


def test_splits_are_joined_with_names_groups_and_ids_of_their_own(saved):
    a, b = saved("a.npz", source()), saved("b.npz", source(100))
    both = load([a, b])
    assert [len(both.train), len(both.valid), len(both.test)] == [12, 4, 6]
    assert both.train.names == [f"{s}/clip {i}" for s in "ab" for i in range(6)]
    assert set(both.train.groups["speaker"]) == {"a/0", "a/1", "b/0", "b/1"}
    assert sorted(ids(both.train) + ids(both.valid) + ids(both.test)) == list(range(22))
    assert both.name == "a+b" and both.label_range == (-3, 3)
    expected = torch.cat([source().train.flat("audio"), source(100).train.flat("audio")])
    assert torch.equal(both.train.flat("audio"), expected)
    assert torch.equal(both.train.fingerprints()[6:], source(100).train.fingerprints())
    assert torch.equal(both.test.labels, torch.cat([source().test.labels, source(100).test.labels]))


def test_what_a_source_lacks_is_missing_in_its_samples(saved):
    a, b = saved("a.npz", source()), saved("b.npz", source(100, modalities=("text", "visual"), speakers=0))
    both = load([a, b])
    assert both.features == {"text": 2, "audio": 2, "visual": 2}
    assert both.train.lengths("audio").tolist() == [*source().train.lengths("audio").tolist(), *[0] * 6]
    assert both.train.lengths("visual")[:6].sum() == 0
    assert both.train.groups["speaker"] == ["a/0", "a/1"] * 3 + [""] * 6
    save(both, a.parent / "both.npz")
    assert load(a.parent / "both.npz").fingerprint() == both.fingerprint()


def test_sources_of_one_name_are_told_apart_by_their_folders(saved):
    paths = [saved("one/data.npz", source()), saved("two/data.npz", source(100))]
    assert load(paths).train.names[::6] == ["one/data/clip 0", "two/data/clip 0"]
    with pytest.raises(UserError, match=r"every source must be given once, got data\.npz twice"):
        load([paths[0], paths[0]])


def test_the_pool_comes_without_labels_whatever_it_is_and_loses_what_is_held_out(saved):
    more = part(4, 200, modalities=("text",))
    copies = source().test.subset([1])
    pooled = MultimodalDataset.concatenate([more, part(1, 300, modalities=("text",)).subset([0])])
    classes = MultimodalData(train=pooled.with_labels(["x", "y", "x", "y", "x"]))
    a, p = saved("a.npz", source()), saved("p.npz", classes)
    data = load(a, pool=p)
    assert data.train.names[0] == "clip 0" and data.unlabelled.names[0] == "p/clip 0"
    assert len(data.unlabelled) == 5 and not data.unlabelled.labelled().any() and data.task == "regression"
    assert data.unlabelled.lengths("audio").sum() == 0 and set(data.unlabelled.groups["speaker"]) == {
        "p/0",
        "p/1",
    }
    twins = MultimodalData(train=MultimodalDataset.concatenate([copies, part(2, 400)]))
    data = load(saved("a.npz", source(speakers=6)), pool=[saved("t.npz", twins)], split="0.5,0.2,0.3", seed=1)
    held_out = torch.cat([data.valid.fingerprints(), data.test.fingerprints()])
    assert not data.unlabelled.among(held_out).any()
    assert any("contents of 1 samples are those of samples of sources before it" in w for w in data.warnings)


def test_sources_are_divided_together(saved):
    a, b = saved("a.npz", source()), saved("b.npz", source(100))
    data = load([a, b], split="speaker:b/1")
    assert set(data.test.groups["speaker"]) == {"b/1"} and set(data.valid.groups["speaker"]) == {"a/0"}
    data = load([a, b], split="0.5,0.25,0.25", group="speaker")
    assert [len(set(p.groups["speaker"])) for p in (data.train, data.valid, data.test)] == [2, 1, 1]


def crossed(offset=0):
    whole = source(offset)
    return replace(whole, unlabelled=whole.train, cross_validation=whole.test)


def test_folds_are_joined_where_all_sources_have_them(saved):
    a, b = saved("a.npz", crossed()), saved("b.npz", crossed(100))
    both = load([a, b])
    assert both.unlabelled is both.train and len(both.cross_validation) == 6
    assert set(ids(both.cross_validation)) == set(ids(both.test))
    with_pool = load([a, b], pool=saved("p.npz", MultimodalData(train=part(3, 300))))
    assert (len(with_pool.unlabelled), len(with_pool.train)) == (15, 0)
    c = saved("c.npz", source(200))
    with pytest.raises(UserError, match=r"all sources must ask for cross-validation or none, .* got a"):
        load([a, c])
    data = load([a, c], split="0.5,0.25,0.25")
    assert sorted(ids(data.train) + ids(data.valid) + ids(data.test)) == list(range(22))


def loaded_with(**changes):
    return replace(source(100), **changes)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (source(100, size=3), "b: text must have 2 features as in a, got 3"),
        (
            loaded_with(label_range=(-1, 1)),
            "b: label_range must be -3, 3 as in a, got -1.0, 1.0; a pool needs no labels",
        ),
        (
            loaded_with(label_range=None).as_task("classification")
            if False
            else MultimodalData(part(3, 50).with_labels(["x", "y", "x"])),
            "b: task must be regression as in a, got classification",
        ),
        (source(), "b must hold other data than a, got the fingerprint"),
    ],
)
def test_sources_that_do_not_go_together_are_refused(saved, other, message):
    paths = [saved("a.npz", source()), saved("b.npz", other)]
    with pytest.raises(UserError, match=message.replace("-3, 3", r"-3.*, 3.*")):
        load(paths)


def test_classes_must_be_the_same(saved):
    names = [["x", "y", "x"], ["x", "z", "x"]]
    paths = [saved(f"{i}.npz", MultimodalData(part(3, 50 * i).with_labels(n))) for i, n in enumerate(names)]
    with pytest.raises(UserError, match="1: targets must be x, y as in 0, got x, z"):
        load(paths)


def test_a_group_without_a_split_and_no_source_are_refused(saved):
    with pytest.raises(UserError, match="group must be given with split alone"):
        load(saved("a.npz", source()), group="speaker")
    with pytest.raises(UserError, match="at least one source must be given"):
        load([])


def test_warnings_are_kept_with_the_source_that_they_are_about():
    from mmfast.data import combine

    both = combine({"a": replace(source(), warnings=["odd"]), "b": source(100)})
    assert both.warnings == ("a: odd",)
