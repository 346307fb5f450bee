"""Protocols of cross-validation: one group left out in turn, k folds, and what a pool may hold."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.data import MultimodalData, MultimodalDataset, divide, load, save
from mmfast.data.folds import described, of_protocol
from mmfast.data.split import fold_parts
from mmfast.errors import UserError
from mmfast.split_spec import Protocol

SIDES = ("train", "valid", "test")


def dialogues(sessions=5, each=4, first_id=0, offset=0.0):
    """Sessions of two speakers each, with so many samples a speaker, of four classes."""
    speakers = [f"Ses0{s}{who}" for s in range(1, sessions + 1) for who in "FM"]
    rows = [(speaker, i) for speaker in speakers for i in range(each)]
    n = len(rows)
    return MultimodalDataset(
        {"audio": [np.full((2, 3), offset + i + 1) for i in range(n)]},
        [i % 4 for i in range(n)],
        ids=range(first_id, first_id + n),
        names=[f"{speaker}_{i}" for speaker, i in rows],
        groups={"speaker": [s for s, _ in rows], "session": [s[4] for s, _ in rows]},
    )


def corpus(**arguments):
    return MultimodalData(dialogues(**arguments), task="classification")


def speakers(part):
    return set(part.groups["speaker"])


def test_each_speaker_is_tested_beside_the_other_of_the_session_and_swapped_pairs_share_training_samples():
    data = divide(corpus(), "speaker")
    folds = [fold_parts(data, i) for i in range(10)]
    assert len(of_protocol(data.cross_validation, data.protocol)) == 10
    assert [speakers(fold["test"]) for fold in folds] == [
        {f"Ses0{s}{who}"} for s in range(1, 6) for who in "FM"
    ]
    for i, fold in enumerate(folds):
        assert speakers(fold["valid"]) == speakers(folds[i ^ 1]["test"])
        assert fold["train"].ids.tolist() == folds[i ^ 1]["train"].ids.tolist() and len(fold["train"]) == 32
    assert [len(getattr(data, side)) for side in SIDES] == [0, 0, 0]
    assert described(data.cross_validation, data.protocol) == (
        "10 folds, leave one speaker out, the others of its session validate; folds of one session have the same "
        "training samples"
    )


def test_one_value_is_the_fold_of_the_protocol_that_tests_it():
    data = divide(corpus(), "speaker")
    one, fold = divide(corpus(), "speaker:Ses03M"), fold_parts(data, 5)
    assert [getattr(one, side).names for side in SIDES] == [fold[side].names for side in SIDES]
    assert one.protocol is None and one.cross_validation is None


def test_without_a_session_the_next_value_validates():
    fold = divide(corpus(), "session:5")
    assert [set(getattr(fold, side).groups["session"]) for side in SIDES] == [{"2", "3", "4"}, {"1"}, {"5"}]
    data = divide(corpus(), "session")
    assert (
        described(data.cross_validation, data.protocol)
        == "5 folds, leave one session out, the next one validates"
    )
    whole = dialogues()
    alone = whole.identified(whole.ids, whole.names, {"speaker": [f"{i % 12}" for i in range(len(whole))]})
    fold = divide(MultimodalData(alone), "speaker:9")
    assert speakers(fold.valid) == {"10"}, "numbers in names are sorted by their size"


def test_a_session_with_one_speaker_is_no_pair():
    whole = dialogues()
    data = MultimodalData(whole.subset([s != "Ses02M" for s in whole.groups["speaker"]]))
    assert speakers(divide(data, "speaker:Ses02F").valid) == {"Ses03F"}


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(0, 30), st.lists(st.integers(0, 9), min_size=8, max_size=40))
def test_k_folds_test_every_sample_once_and_are_those_of_the_single_words(k, seed, groups):
    values = {"text": [np.full((1, 2), i) for i in range(len(groups))]}
    labels = [float("nan") if i % 7 == 6 else i % 3 for i in range(len(groups))]
    data = MultimodalData(MultimodalDataset(values, labels, groups={"video": [f"v{g}" for g in groups]}))
    try:
        crossed = divide(data, f"kfold:{k}", seed=seed)
    except UserError as error:
        assert "n_folds must lie in" in str(error)
        return
    tested = []
    for i in range(k):
        fold, one = fold_parts(crossed, i), divide(data, f"kfold:{k}:{i}", seed=seed)
        assert [fold[side].ids.tolist() for side in SIDES] == [
            getattr(one, side).ids.tolist() for side in SIDES
        ]
        videos = [set(fold[side].groups["video"]) for side in SIDES]
        assert sum(map(len, videos)) == len(set(groups))
        assert sum(len(fold[side]) for side in SIDES) == len(groups)
        tested += fold["test"].subset(fold["test"].labelled()).ids.tolist()
    assert sorted(tested) == [i for i, label in enumerate(labels) if label == label]


def test_the_pool_of_a_fold_holds_nothing_of_the_speakers_and_sessions_that_are_held_out():
    pool = dialogues(each=2, first_id=500, offset=0.5).with_labels(None)
    copy = dialogues(each=1, first_id=900).identified(range(900, 910), list("abcdefghij"), {})
    pool = MultimodalDataset.concatenate([pool, copy.with_labels(None)])
    data = divide(replace(corpus(), unlabelled=pool), "speaker")
    fold = fold_parts(data, 0)
    assert {"Ses01F", "Ses01M"}.isdisjoint(speakers(fold["unlabelled"]))
    held_out = fold["valid"].ids.tolist() + fold["test"].ids.tolist()
    assert not fold["unlabelled"].among(dialogues().fingerprints()[held_out]).any()
    assert len(fold["unlabelled"]) == 8 * 2 + 2, "copies of eight samples are of session 1"
    one = divide(replace(corpus(), unlabelled=pool), "speaker:Ses01F")
    assert one.unlabelled.ids.tolist() == fold["unlabelled"].ids.tolist()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("speaker:Bob", "split: speaker must be one of Ses01F, Ses01M, .*, got 'Bob'"),
        ("actor", "split: 'actor' must be one of the groups speaker, session of the data"),
        ("session", "there must be three at least, got 1, 2"),
        ("kfold:9", r"split: n_folds must lie in \[2, samples or groups = 4\]"),
    ],
)
def test_what_cannot_be_left_out_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        divide(corpus(sessions=2), spec)


def test_a_group_beside_the_one_that_is_left_out_is_refused():
    with pytest.raises(
        UserError, match="split: group must not be given where one speaker is left out, got 'session'"
    ):
        divide(corpus(), "speaker", group="session")


def test_a_protocol_is_kept_in_the_file_and_counts_in_the_fingerprint(tmp_path):
    data = divide(corpus(), "kfold:4", seed=3, group="session")
    save(data, tmp_path / "data.npz")
    again = load(tmp_path / "data.npz")
    assert again.protocol == data.protocol and again.fingerprint() == data.fingerprint()
    assert fold_parts(again, 2)["test"].names == fold_parts(data, 2)["test"].names
    assert divide(corpus(), "kfold:4").fingerprint() != data.fingerprint()
    for words in (["kfold:4:1", 0, None], ["speaker", "0", None], ["speaker", 0, 1], ["speaker"]):
        with pytest.raises(UserError, match="protocol must be kfold:K or a group"):
            Protocol.of_words(words)


def test_a_protocol_needs_samples_to_cross_validate():
    with pytest.raises(UserError, match="a protocol needs samples to cross-validate"):
        replace(corpus(), protocol=divide(corpus(), "speaker").protocol)
