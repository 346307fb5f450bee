"""Probabilistic knowledge transfer: what is refused, and in which words."""

import pytest
import torch

from mmfast.errors import UserError
from mmfast.losses.transfer import DirectedPKTLoss, PKTLoss, directed_pkt, pkt


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"v": None}, TypeError, "v must be a tensor, got None"),
        ({"v": torch.ones(4, 2, 2)}, UserError, r"v must have shape \(B, D\), got"),
        ({"v": torch.ones(3, 2)}, UserError, r"v must have the 4 rows of t, got \(3, 2\)"),
        ({"v": torch.ones(4, 2).double()}, TypeError, "v must have the dtype of t"),
        ({"v": torch.ones(4, 2, device="meta")}, UserError, "v must be on the device of t"),
        ({3: torch.ones(4, 2)}, TypeError, "views must have names that are strings, got 3"),
        (
            {"v": torch.tensor([[1.0], [2], [float("nan")], [3]])},
            UserError,
            "v must be finite, got 1 NaN .* row 2",
        ),
        (
            {"v": torch.tensor([[1.0], [2], [3], [float("inf")]])},
            UserError,
            "v must be finite, got 1 NaN .* row 3",
        ),
    ],
)
def test_views_are_checked(change, error, words):
    views = {"t": torch.ones(4, 3), **change}
    with pytest.raises(error, match=f"^pkt: {words}"):
        pkt(views)
    with pytest.raises(error, match=f"^directed_pkt: {words}"):
        directed_pkt(views, {name: torch.ones(4) for name in views})


def test_too_little():
    with pytest.raises(UserError, match=r"^pkt: views must have at least 2 modalities, got 1"):
        pkt({"t": torch.ones(4, 3)})
    for rows in (0, 1):
        with pytest.raises(UserError, match=rf"^pkt: t must have at least 2 rows .*, got \({rows}, 3\)"):
            pkt({"t": torch.ones(rows, 3), "v": torch.ones(rows, 3)})
    with pytest.raises(TypeError, match=r"^pkt: views must be a mapping, got list"):
        pkt([torch.ones(4, 3)] * 2)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"scale": "mean"}, UserError, "scale must be one of entry_mean, row_sum, got 'mean'"),
        ({"exclude_self": 1}, TypeError, "exclude_self must be True or False, got 1"),
        ({"teacher_grad": None}, TypeError, "teacher_grad must be True or False, got None"),
        ({"eps": 0}, UserError, "eps must be finite and above 0, got 0"),
        (
            {"pairs": [("t", "t")]},
            UserError,
            "pairs must have a teacher other than the student, got 't' twice",
        ),
        ({"pairs": [("t", "v")] * 2}, UserError, r"pairs must differ, got \('t', 'v'\) twice"),
        ({"pairs": []}, UserError, "pairs must be at least one, got none"),
        ({"pairs": "tv"}, TypeError, r"pairs must be pairs \(teacher, student\) of two names, got 'tv'"),
        ({"pairs": ["tv"]}, TypeError, r"pairs must be pairs \(teacher, student\) of two names, got 'tv'"),
    ],
)
def test_options_are_checked(options, error, words):
    with pytest.raises(error, match=f"^pkt: {words}"):
        pkt({"t": torch.ones(4, 3), "v": torch.ones(4, 3)}, **options)
    with pytest.raises(error, match=f"^pkt: {words}"):
        PKTLoss(**options)


@pytest.mark.parametrize(
    "g, error, words",
    [
        (torch.ones(3), UserError, r"must have shape \(4,\), .*got \(3,\)"),
        (torch.ones(4, dtype=torch.int64), TypeError, "must be floating, got torch.int64"),
        (torch.ones(4, requires_grad=True), UserError, "must not require a gradient"),
        (torch.tensor([1.0, -1, 0, 0]), UserError, "must be finite and at least 0, got -1.0 in row 1"),
        (
            torch.tensor([1.0, 1, float("nan"), 0]),
            UserError,
            "must be finite and at least 0, got nan in row 2",
        ),
        (torch.ones(4, device="meta"), UserError, "must be on the device of t"),
        (0.5, TypeError, "must be a tensor, got 0.5"),
    ],
)
def test_weights_are_checked(g, error, words):
    views = {"t": torch.ones(4, 3), "v": torch.ones(4, 3)}
    with pytest.raises(error, match=rf"^pkt: weights\['t', 'v'\] {words}"):
        pkt(views, {("t", "v"): g}, pairs=[("t", "v")])
    with pytest.raises(error, match=rf"^directed_pkt: confidence\['v'\] {words}"):
        directed_pkt(views, {"t": torch.ones(4), "v": g})


def test_what_is_named_is_checked():
    views, g = {"t": torch.ones(4, 3), "v": torch.ones(4, 3)}, torch.ones(4)
    with pytest.raises(UserError, match=r"^pkt: pairs must be of t, v, got 'x'"):
        pkt(views, pairs=[("t", "x")])
    with pytest.raises(UserError, match=r"^pkt: weights must have one .*, got one for \('t', 'x'\)"):
        pkt(views, {("t", "x"): g})
    with pytest.raises(UserError, match=r"^pkt: weights must have one .*, got none for \('v', 't'\)"):
        pkt(views, {("t", "v"): g})
    with pytest.raises(UserError, match=r"^directed_pkt: confidence must have one .*, got none for 'v'"):
        directed_pkt(views, {"t": g})
    with pytest.raises(UserError, match=r"^directed_pkt: confidence must have one .*, got one for 'x'"):
        directed_pkt(views, {"t": g, "v": g, "x": g})
    for name, rule in {
        "preset": "one of document, released",
        "orientation": "one of student, teacher",
        "level": "one of instance, batch",
    }.items():
        with pytest.raises(UserError, match=f"^directed_pkt: {name} must be {rule}, got 'x'"):
            DirectedPKTLoss(**{name: "x"})
