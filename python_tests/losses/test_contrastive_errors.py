"""Contrastive losses and losses of pairs: what is refused, and in which words."""

import math

import pytest
import torch

from mmfast import functional as F
from mmfast.errors import UserError

Z = torch.randn(4, 3)
L = torch.tensor([0, 0, 1, 1])
REFUSED = [
    (lambda: F.nt_xent(Z), "nt_xent: labels must be given for one view"),
    (lambda: F.sup_con(Z), "sup_con: labels must be given for one view"),
    (lambda: F.sup_con(Z[0], L), r"sup_con: z must have shape \(B, D\) with D >= 1, got \(3,\)"),
    (lambda: F.sup_con(Z, L[:3]), r"sup_con: labels must have shape \(4,\), .*got \(3,\)"),
    (lambda: F.sup_con(Z, L.float()), "sup_con: labels must be integers, got torch.float32"),
    (lambda: F.sup_con(Z[:1], L[:1]), r"sup_con: z must have at least 2 rows .*got \(1, 3\)"),
    (lambda: F.sup_con(Z, L, 0.0), "sup_con: temperature must be finite and above 0, got 0"),
    (lambda: F.sup_con(Z, L, torch.tensor(-1.0)), "sup_con: temperature must be .* above 0, got -1"),
    (lambda: F.sup_con(Z, L, "0.1"), "sup_con: temperature must be a number or a scalar tensor"),
    (lambda: F.sup_con(Z, L, variant="outer"), "sup_con: variant must be one of out, in, solo, hobbit"),
    (lambda: F.sup_con(Z, L, reduction="average"), "sup_con: reduction must be one of mean, sum, none"),
    (lambda: F.sup_con(Z, L, over="rows"), "sup_con: over must be one of anchors, all, pairs"),
    (lambda: F.sup_con(Z, L, stats="local"), "sup_con: stats must be one of 'global', None, got 'local'"),
    (lambda: F.sup_con(Z, L, normalise=1), "sup_con: normalise must be True or False, got 1"),
    (lambda: F.sup_con(Z, L, valid=L), "sup_con: valid must be a bool tensor, got torch.int64"),
    (
        lambda: F.sup_con(Z, L, weights=-Z[:, 0].abs()),
        "sup_con: weights must be finite and at least 0, got -",
    ),
    (lambda: F.sup_con(Z, L, weights=torch.ones(4, requires_grad=True)), "weights must not require"),
    (lambda: F.nt_xent(Z, Z[:3]), r"nt_xent: z_b must have the 4 rows of z_a, got \(3, 3\)"),
    (lambda: F.nt_xent(Z, Z.double()), r"nt_xent: z_b must have the dtype of z_a \(torch.float32\)"),
    (lambda: F.nt_xent(Z, 0.5), "nt_xent: z_b must be a tensor, got 0.5"),
    (lambda: F.info_nce(Z, Z[:3]), r"info_nce: key must have the 4 rows of query"),
    (lambda: F.info_nce(Z, Z, Z[:, :2]), r"info_nce: negatives must have the 3 columns of query"),
    (lambda: F.info_nce(Z, Z, targets=L + 3), r"info_nce: targets must be rows of key, in \[0, 3\], got 4"),
    (
        lambda: F.clip(Z, Z, logit_scale=torch.ones(2)),
        "clip: logit_scale must be a number or a floating scalar",
    ),
    (lambda: F.siglip(Z, Z, bias=math.nan), "siglip: bias must be finite, got nan"),
]


@pytest.mark.parametrize("call, sentence", REFUSED, ids=[sentence[:40] for _, sentence in REFUSED])
def test_refusals(call, sentence):
    with pytest.raises((UserError, TypeError), match=sentence):
        call()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_named(wrong):
    z = Z.clone()
    z[2, 1] = wrong
    with pytest.raises(
        UserError, match=r"^sup_con: z must be finite, got 1 NaN or infinite .* row 2, column 1"
    ):
        F.sup_con(z, L)
    for call, words in (
        (lambda: F.info_nce(Z, z), "info_nce: key must .* row 2"),
        (lambda: F.info_nce(Z, Z, z), "info_nce: negatives must .* row 2"),
        (lambda: F.nt_xent(Z, z), "nt_xent: z_b must .* row 2"),
        (lambda: F.sup_con(torch.stack((Z, z), 1), L), r"sup_con: z\[:, 1\] must .* row 2"),
        (lambda: F.n_pair(z, Z), "n_pair: query must .* row 2"),
    ):
        with pytest.raises(UserError, match=f"^{words}"):
            call()
    kept = torch.tensor([True, True, False, True])
    assert F.nt_xent(Z, z, valid=kept).isfinite()
    z[1, 0] = wrong
    with pytest.raises(UserError, match=r"^nt_xent: z_b must be finite, got 1 NaN .* row 1, column 0"):
        F.nt_xent(Z, z, valid=kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_that_overflow_are_told_of(dtype):
    large, labels = 1e30 * Z.to(dtype), L
    assert F.sup_con(large, labels).isfinite()
    for call, op in (
        (lambda: F.n_pair(large, large), "n_pair: query"),
        (lambda: F.sup_con(large, labels, normalise=False), "sup_con: z"),
        (lambda: F.clip(Z.to(dtype), large * large.sign(), normalise=False, temperature=1e-20), "clip: key"),
        (lambda: F.soft_nearest_neighbour(large, labels), "soft_nearest_neighbour: z"),
        (lambda: F.pairwise_hinge(large, large, normalise=False), "pairwise_hinge: query"),
        (lambda: F.nt_xent(large, large, normalise=False, reduction="none"), "nt_xent: z_a"),
    ):
        with pytest.raises(
            UserError, match=f"^{op} must have lengths within the range of torch.float32, got"
        ):
            call()


def test_scalars_that_are_not_finite_are_refused():
    for call, words in (
        (
            lambda: F.clip(Z, Z, logit_scale=torch.tensor(math.nan)),
            "clip: logit_scale must be finite, got nan",
        ),
        (lambda: F.siglip(Z, Z, torch.tensor(math.inf)), "siglip: scale must be finite, got inf"),
        (lambda: F.siglip(Z, Z, bias=torch.tensor(math.nan)), "siglip: bias must be finite, got nan"),
        (lambda: F.sup_con(Z, L, 1e-40), "sup_con: temperature must have a reciprocal within the range of"),
        (lambda: F.sup_con(Z, L, torch.tensor(1e-40)), "sup_con: temperature must have a reciprocal within"),
    ):
        with pytest.raises(UserError, match=f"^{words}"):
            call()
