import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from mmfast.data import MultimodalData, MultimodalDataset, load, save
from mmfast.data.align import _means, align, overlapping
from mmfast.data.choose import choose
from mmfast.errors import UserError


def taken(n: int, m: int, t: int) -> list[int]:
    """The rule as it is written, in exact fractions."""
    low, high = Fraction(t, n), Fraction(t + 1, n)
    width = [min(high, Fraction(i + 1, m)) - max(low, Fraction(i, m)) for i in range(m)]
    return [i for i, w in enumerate(width) if w > Fraction(1, 10**9)]


def means(values: np.ndarray, n: int) -> np.ndarray:
    return np.stack([values[taken(n, len(values), t)].astype(np.float64).mean(0) for t in range(n)])


def data(text, audio, **splits):
    lengths = {"text": [len(x) for x in text], "audio": [len(x) for x in audio]}
    values = {"text": torch.cat(text), "audio": torch.cat(audio)}
    return MultimodalData(
        train=MultimodalDataset.from_flat(values, lengths, list(range(len(text)))), **splits
    )


def random(*lengths, features=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, features, generator=generator) for n in lengths]


def test_frames_that_a_step_takes_are_those_of_the_rule():
    for n, m in itertools.product((1, 2, 3, 7, 8, 12, 31), (1, 2, 3, 5, 7, 24, 50)):
        first, last = overlapping(torch.tensor([m]), torch.tensor([n]))
        found = [list(range(a, b + 1)) for a, b in zip(first.tolist(), last.tolist(), strict=True)]
        assert found == [taken(n, m, t) for t in range(n)], (n, m)


def test_an_overlap_of_less_than_a_billionth_is_none():
    # Neighbours overlap by 1 / (n m) of the duration: above a billionth, and below.
    first, last = overlapping(torch.tensor([31_623]), torch.tensor([31_622]))
    assert (first[1], last[1]) == (1, 2)
    first, last = overlapping(torch.tensor([31_624]), torch.tensor([31_623]))
    assert (first[1], last[1]) == (1, 2) and int(last[0]) == 0 and int(first[-1]) == 31_623


@pytest.mark.parametrize("cells", [1, 40, 1 << 22])
def test_steps_are_means_of_the_frames_they_take(monkeypatch, cells):
    monkeypatch.setattr("mmfast.data.align.CELLS", cells)
    text, audio = random(5, 4, 0, 7, 3, 1), random(11, 4, 6, 0, 2, 9)
    before = data(text, audio)
    train = align(before, "text").train
    assert train.lengths("text").tolist() == [5, 4, 0, 7, 3, 1]
    assert train.lengths("audio").tolist() == [5, 4, 6, 0, 3, 1]
    assert torch.equal(train.flat("text"), torch.cat(text))
    for i, sample in enumerate(audio):
        wanted = means(sample.numpy(), len(text[i])) if len(text[i]) and len(sample) else sample
        got = train[i].values["audio"].numpy()
        np.testing.assert_array_equal(got, np.asarray(wanted, np.float32).reshape(got.shape))
    assert torch.equal(before.train.flat("audio"), torch.cat(audio))
    assert (train.names, train.labels.tolist()) == (before.train.names, before.train.labels.tolist())


def test_steps_without_reference_stay_and_are_counted():
    text, audio = random(5, 0, 3), random(7, 2, 3)
    visual = random(2, 4, 3)
    dataset = MultimodalDataset({"text": text, "audio": audio, "visual": visual})
    found = align(MultimodalData(train=dataset), "text")
    assert found.train.lengths("audio").tolist() == [5, 2, 3]
    assert found.train.lengths("visual").tolist() == [5, 4, 3]
    assert found.warnings == (
        "samples aligned to text by position, for want of times (an approximation): 1",
        "samples left unaligned, for they lack text: 1",
    )


def test_splits_that_are_the_same_stay_the_same():
    whole = MultimodalDataset({"text": random(3, 2), "audio": random(5, 2)})
    found = align(MultimodalData(train=whole, unlabelled=whole), "audio")
    assert found.unlabelled is found.train and not found.train.unaligned().any()
    assert found.train.lengths("text").tolist() == [5, 2]


def test_contents_that_change_have_other_fingerprints():
    before = data(random(5, 4), random(11, 4))
    before.fingerprint()
    after = align(before, "text")
    same = before.train.fingerprints() == after.train.fingerprints()
    assert same.tolist() == [False, True]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_broken_cells_stay_where_they_are(broken):
    (audio,) = random(8, features=2)
    audio[5, 1] = broken
    got = align(data(random(4, features=2), [audio]), "text").train[0].values["audio"]
    assert torch.isfinite(got).sum() == 7
    torch.testing.assert_close(got[2, 1], torch.tensor(broken), equal_nan=True)


def test_infinities_of_both_signs_meet_as_not_a_number():
    audio = torch.tensor([[float("inf")], [-float("inf")], [1.0], [3.0]])
    got = align(data(random(2, features=1), [audio]), "text").train[0].values["audio"]
    assert got[0].isnan() and got[1] == 2


def test_aligned_data_are_handed_back():
    aligned = data(random(3, 0, 2), random(3, 4, 0))
    assert align(aligned, "text") is aligned and align(aligned, "strict") is aligned


def test_means_do_not_lose_small_numbers_beside_large_ones():
    flat = torch.tensor([[1e30], [1e30], [1.0], [3.0]])
    assert _means(flat, torch.tensor([4]), torch.tensor([2]))[1] == 2


def test_strict_names_the_first_sample():
    unaligned = data(random(4, 7), random(4, 6))
    with pytest.raises(UserError) as caught:
        align(unaligned, "strict")
    assert str(caught.value) == (
        "align: train[1].audio must have as many steps as text (7), got 6 ('1'); --align text takes means"
    )


def test_words_stay_with_the_steps_of_text():
    words = [["a", "b", "c"], ["d"]]
    dataset = MultimodalDataset({"text": random(3, 1), "audio": random(5, 4)}, words=words)
    assert align(MultimodalData(train=dataset), "text").train.words == words
    found = align(MultimodalData(train=dataset), "audio")
    assert (
        found.train.words is None
        and found.warnings[1] == "words are left out: text has the steps of audio now"
    )


def test_any_layout_can_be_aligned_and_thinned_out(tmp_path):
    whole = data(random(4, 7), random(4, 6))
    save(whole, tmp_path / "data.npz")
    found = load(tmp_path / "data.npz", align="text", modalities="audio")
    assert found.modalities == ("audio",)
    assert torch.equal(found.train.flat("audio"), align(whole, "text").train.flat("audio"))


def test_no_such_reference():
    with pytest.raises(UserError, match="the reference must be one of text, audio or strict, got 'video'"):
        align(data(random(4), random(4)), "video")


@pytest.mark.parametrize("names", ["audio,text", "audio, text", ("audio", "text"), ["text", "audio", "text"]])
def test_choosing_keeps_the_usual_order(names):
    dataset = MultimodalDataset({"text": random(2, 0), "audio": random(3, 0), "visual": random(2, 5)}, [1, 2])
    found = choose(MultimodalData(train=dataset, unlabelled=dataset), names)
    assert found.modalities == ("text", "audio") and found.unlabelled is found.train
    assert found.valid.features == {"text": 3, "audio": 3}
    assert torch.equal(found.train.flat("audio"), dataset.flat("audio"))
    assert found.train.lengths("text").tolist() == [2, 0] and found.train.labels.tolist() == [1, 2]
    assert found.warnings == ("samples with none of text, audio: 1",)


def test_choosing_all_changes_nothing():
    whole = data(random(4), random(4))
    assert choose(whole, "audio,text") is whole


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("audio,video", "modalities must be among text, audio, got 'video'"),
        ("", "modalities must be among text, audio, got ''"),
        ((), "modalities must name at least one of text, audio, got none"),
    ],
)
def test_modalities_that_are_not_there_are_refused(names, message):
    with pytest.raises(UserError, match=message):
        choose(data(random(4), random(4)), names)
