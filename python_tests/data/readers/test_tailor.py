"""TAILOR's files: what the rows of the layouts do not show."""

import re

import numpy as np
import pytest
import torch
from layouts.tailor import content
from padded_help import SIZES, Held, bomb, changed, odd_values

from mmfast.data.options import Options
from mmfast.data.readers import mult, tailor
from mmfast.errors import UserError


@pytest.fixture
def found():
    return content(torch.from_numpy)


def read(found):
    return tailor.read(Held(found), Options())


def test_it_is_told_from_mult(found):
    assert tailor.recognises(Held(found)) and not mult.recognises(Held(found))


def test_no_emotion_at_all_is_a_label(found):
    found["test"]["tgt"] = [[2, 3], np.array([2, 9, 4, 3]), torch.tensor([2, 7, 3])]
    labels = read(found).test.labels
    assert labels.tolist() == [[0] * 6, [1, 0, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0]]


def test_features_with_names_of_other_layouts_are_not_read(found):
    assert read(changed(found, "test", text=np.ones((1, 2)))).features == {"text": 4, "audio": 3, "visual": 2}


WRONG = [
    ({"tgt": [[2, 3]] * 4}, "x.pkl: valid.tgt must have 3 rows as src-text, got 4"),
    ({"tgt": [[2, 11, 3]] * 3}, "x.pkl: valid.tgt[0] must hold 4 to 9 inside, got 11"),
    ({"tgt": [[4, 5]] * 3}, "x.pkl: valid.tgt[0] must begin with 2 and end with 3, got [4, 5]"),
    ({"tgt": [[2, 3], [2], [2, 3]]}, "x.pkl: valid.tgt[1] must be a list of tokens from 2 to 3, got [2]"),
    ({"tgt": 5}, "x.pkl: valid.tgt must be a list of tokens a sample, got int"),
    ({"tgt": [[2, bomb(), 3]] * 3}, "x.pkl: valid.tgt[0] must hold 4 to 9 inside, got [["),
    (
        {"src-text": [np.ones((6, 4)), np.ones((5, 4)), np.ones((6, 4))]},
        "x.pkl: valid.src-text[1] must be (L, F) as the first, (6, 4), got (5, 4)",
    ),
    (
        {"src-text": torch.ones(1).expand(3, 2**40, 4)},
        "x.pkl: valid.src-text must be stored whole, got (3, 1099511627776, 4) of fewer numbers",
    ),
    (
        {"src-text": [np.ones((10**6, 12))] * 3},
        "x.pkl: valid.src-text must hold an array of its own for each sample, got 3 times a few",
    ),
]


@pytest.mark.parametrize(("entries", "message"), WRONG)
def test_what_does_not_fit_is_refused_in_one_sentence(found, entries, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(changed(found, "valid", **entries))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("key", ["src-text", "src-visual", "tgt"])
def test_whatever_stands_there_nothing_but_a_sentence_is_raised(found, key):
    for value in odd_values(SIZES["valid"]):
        try:
            read(changed(found, "valid", **{key: value}))
        except UserError as error:
            assert "\n" not in str(error) and str(error).startswith("x.pkl: ")
