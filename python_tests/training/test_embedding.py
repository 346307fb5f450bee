"""Embeddings: the encoder's own vectors, of the right samples in the right order, with what is missing as zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from training_help import checkpoint, mmfast, train

from mmfast import UserError
from mmfast.data import MultimodalData, Standardiser, collate, save, synthetic
from mmfast.models import M3Encoder, Steps
from mmfast.training import Embeddings, embed
from mmfast.training.embedding import encode

FEATURES = {"text": 8, "audio": 6, "visual": 4}
MISSING = "--data.synthetic.missing=0.3"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a pre-training run, a fine-tuning run from it, and their data in a file."""
    folder = tmp_path_factory.mktemp("made")
    train("pretrain", folder / "pre", MISSING, "--pretraining.epochs=1")
    train("finetune", folder / "fine", MISSING, f"--from={folder / 'pre/last.ckpt'}", "--supervised.epochs=1")
    save(data(), folder / "data.npz")
    return folder


def data() -> MultimodalData:
    return synthetic(80, labelled=0.5, missing=0.3, max_length=6, features=FEATURES)


CHECKPOINTS = {"pretrain": "pre/last.ckpt", "finetune": "fine/best.ckpt"}
both = pytest.mark.parametrize("kind", CHECKPOINTS)


@both
def test_vectors_are_those_of_the_encoder_one_sample_after_another(kind, made):
    given = checkpoint(made / CHECKPOINTS[kind])
    encoder = M3Encoder(FEATURES, 8).eval()
    encoder.load_state_dict(
        {k.removeprefix("encoder."): v for k, v in given["state_dict"].items() if k.startswith("encoder.")}
    )
    test = Standardiser().load_state_dict(given["mmfast"]["standardiser"]).transform(data().test)
    found = embed(made / CHECKPOINTS[kind], split="test")
    assert len(found) == len(test) == 16
    assert found.names == test.names and torch.equal(found.ids, test.ids)
    torch.testing.assert_close(found.labels, test.labels, rtol=0, atol=0, equal_nan=True)
    for i in range(len(test)):
        batch = collate([test[i]], padding="front")
        each = encoder.encode(batch.values, batch.lengths, "front")
        torch.testing.assert_close(found.fused[i], encoder.fuse(each)[0], atol=1e-5, rtol=1e-5)
        for modality in FEATURES:
            n = int(batch.lengths[modality])
            assert bool(found.present[modality][i]) == (n > 0)
            own = each[modality].values[0, :n].mean(0) if n else torch.zeros(8)
            torch.testing.assert_close(found.modalities[modality][i], own, atol=1e-5, rtol=1e-5)
    assert not all(present.all() for present in found.present.values()), "some modality must be missing"


@both
def test_the_file_reads_back_without_pickle(kind, made, tmp_path, capfd):
    out = tmp_path / "new folder/z.npz"
    path = made / CHECKPOINTS[kind]
    assert mmfast("embed", path, f"--data={made / 'data.npz'}", "--split=valid", f"--out={out}") == 0
    said = capfd.readouterr()
    assert said.out == f"7 vectors of 8 numbers: {out}\n"
    assert ("7 seen in training" in said.err) == (kind == "finetune")
    wanted = embed(path, made / "data.npz", "valid")
    with np.load(out, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    keys = {"fused", "ids", "labels", "seen", "names", "task", "targets", "checkpoint", "split"}
    assert arrays.keys() == keys | {f"{key}/{m}" for key in ("modality", "present") for m in FEATURES}
    assert arrays["names"].tolist() == wanted.names and str(arrays["split"]) == "valid"
    assert str(arrays["checkpoint"]) == str(path)
    assert (str(arrays["task"]), arrays["targets"].tolist()) == ("regression", ["label"])
    for name in ("fused", "ids", "labels", "seen"):
        np.testing.assert_array_equal(arrays[name], getattr(wanted, name).numpy())
    for m in FEATURES:
        np.testing.assert_array_equal(arrays[f"modality/{m}"], wanted.modalities[m].numpy())
        np.testing.assert_array_equal(arrays[f"present/{m}"], wanted.present[m].numpy())
    assert {a.dtype for k, a in arrays.items() if k == "fused" or k.startswith("modality")} == {
        np.dtype("float32")
    }


def test_neither_batches_nor_order_matter(made, tmp_path, monkeypatch):
    whole = embed(made / "pre/last.ckpt", split="all")
    assert len(whole) == 80 and len(set(whole.names)) == 80
    monkeypatch.setattr("mmfast.training.predictions.BATCH", 3)
    order = torch.randperm(16).tolist()
    save(MultimodalData(test=data().test.subset(order)), tmp_path / "shuffled.npz")
    few = embed(made / "pre/last.ckpt", tmp_path / "shuffled.npz", "test")
    rows = [whole.names.index(name) for name in few.names]
    assert few.names == [data().test.names[i] for i in order]
    torch.testing.assert_close(few.fused, whole.fused[rows], atol=1e-5, rtol=1e-5)
    for m in FEATURES:
        torch.testing.assert_close(few.modalities[m], whole.modalities[m][rows], atol=1e-5, rtol=1e-5)


def test_unseen_leaves_out_what_the_run_saw(made):
    all_of_them, unseen = (embed(made / "fine/best.ckpt", split=split) for split in ("all", "unseen"))
    assert unseen.names == [
        n for n, seen in zip(all_of_them.names, all_of_them.seen, strict=True) if not seen
    ]
    assert set(data().test.names) <= set(unseen.names) and not unseen.seen.any()
    inputs = {*data().train.names}
    assert {n for n, seen in zip(all_of_them.names, all_of_them.seen, strict=True) if seen} >= inputs


def test_an_encoder_that_says_something_of_what_is_missing_is_not_believed():
    class Constant(M3Encoder):
        def vectors(self, representations):
            return {name: torch.ones(len(steps.lengths), 2) for name, steps in representations.items()}

    dataset = data().train
    _, modalities = encode(Constant(FEATURES, 8), Standardiser().fit(dataset).transform(dataset))
    for m in FEATURES:
        torch.testing.assert_close(modalities[m], (dataset.lengths(m) > 0).float()[:, None].expand(-1, 2))


def test_an_encoder_without_vectors_of_single_modalities_is_one_sentence():
    class Tuples(M3Encoder):
        def encode(self, *batch):
            return {name: tuple(steps) for name, steps in super().encode(*batch).items()}

        def fuse(self, representations, without=()):
            return super().fuse({name: Steps(*pair) for name, pair in representations.items()}, without)

    dataset = Standardiser().fit(data().test).transform(data().test)
    with pytest.raises(
        UserError, match="embed: Tuples: the representation of text must be Steps or a tensor"
    ):
        encode(Tuples(FEATURES, 8), dataset)


def test_labels_of_every_task_come_with_the_names_of_their_targets(made, tmp_path):
    for task in ("classification", "multilabel"):
        emotions = synthetic(80, max_length=6, features=FEATURES, task=task)
        save(emotions, tmp_path / "emotions.npz")
        found = embed(made / "pre/last.ckpt", tmp_path / "emotions.npz", "test")
        found.save(tmp_path / "z.npz")
        with np.load(tmp_path / "z.npz", allow_pickle=False) as file:
            np.testing.assert_array_equal(file["labels"], emotions.test.labels.numpy())
            assert str(file["task"]) == task and file["targets"].tolist() == list(emotions.targets)
            assert file["labels"].shape == ((16,) if task == "classification" else (16, 6))


def test_gradients_are_off_and_the_mode_is_kept():
    encoder = M3Encoder(FEATURES, 8, dropout=0.5).train()
    dataset = Standardiser().fit(data().test).transform(data().test)
    first, again = (encode(encoder, dataset)[0] for _ in range(2))
    assert encoder.training and not first.requires_grad
    assert torch.equal(first, again), "dropout is off"


WRONG = {
    "no such checkpoint": (["{made}/none.ckpt"], "no such file"),
    "foreign checkpoint": (["{made}/foreign.ckpt"], "not written by mmfast"),
    "other features": (
        ["{made}/pre/last.ckpt", "--data={made}/pose.npz"],
        "was trained on the features text 8",
    ),
    "no such data": (["{made}/pre/last.ckpt", "--data={made}/none"], "does not exist"),
    "nowhere to write": (["{made}/pre/last.ckpt", "--out={made}/data.npz/z.npz"], "cannot save"),
    "an empty split": (
        ["{made}/pre/last.ckpt", "--split=unlabelled"],
        "embed: the unlabelled split holds no",
    ),
    "no such split": (["{made}/pre/last.ckpt", "--split=half"], "--split must be one of train, valid, test"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence_with_status_2(case, made, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}}, made / "foreign.ckpt")
    save(synthetic(80, max_length=6, features={"text": 8, "pose": 5}), made / "pose.npz")
    arguments, sentence = WRONG[case]
    assert mmfast("embed", *(a.format(made=made) for a in arguments)) == 2
    error = capfd.readouterr().err
    assert sentence in error and error.count("\n") == 1 and error.startswith("mmfast: ")
    assert not list(tmp_path.iterdir())


def test_splits_are_named_in_python_too(made):
    with pytest.raises(UserError, match=r"split must be one of train, valid, test, .*, got 'half'"):
        embed(made / "pre/last.ckpt", split="half")


def test_a_file_that_cannot_be_written_leaves_the_previous_one(made, tmp_path, monkeypatch):
    found = embed(made / "pre/last.ckpt", split="test")
    found.save(tmp_path / "z.npz")
    before = (tmp_path / "z.npz").read_bytes()
    monkeypatch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left on device; the previous file is untouched"):
        Embeddings.save(found, tmp_path / "z.npz")
    assert (tmp_path / "z.npz").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
