"""SupConLoss by the signature of HobbitLong/SupContrast, against what its losses.py computes."""

import pytest
import torch
from similarity_rows import DOUBLE, KEYS, Y, Z, golden, gradients, rows, same
from torch.nn.functional import normalize

from mmfast.adapters.supcontrast import SupConLoss
from mmfast.errors import UserError


def formula(features, labels=None, mask=None, temperature=0.07, mode="all", base=0.07):
    """mean over anchors of -(T / T_base) sum(mask * log_prob) / sum(mask), rows of the first views first."""
    features = features.flatten(2)
    samples, views = features.shape[:2]
    if labels is not None:
        mask = labels.view(-1, 1) == labels.view(1, -1)
    mask = torch.eye(samples) if mask is None else mask
    candidates = torch.cat(features.unbind(1))
    anchors = candidates if mode == "all" else features[:, 0]
    logits = anchors @ candidates.T / temperature
    others = 1 - torch.eye(len(candidates), **DOUBLE)[: len(anchors)]
    mask = mask.double().repeat(len(anchors) // samples, views) * others
    log_prob = logits - ((logits - logits.max()).exp() * others).sum(1, keepdim=True).log() - logits.max()
    count = torch.where(mask.sum(1) < 1e-6, 1, mask.sum(1))
    return -(temperature / base) * ((mask * log_prob).sum(1) / count).mean()


SAME = (Y[:, None] == Y).float()
OPTIONS = {
    "default": ({}, {}),
    "temperature": ({"temperature": 0.3}, {"temperature": 0.3}),
    "base": ({"temperature": 0.3, "base_temperature": 0.9}, {"temperature": 0.3, "base": 0.9}),
    "one": ({"contrast_mode": "one"}, {"mode": "one"}),
}


def half(mask):
    """Of some samples only, weighted, not symmetric."""
    return torch.rand(8, 8, generator=torch.Generator().manual_seed(4)).round(decimals=1) * mask


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize(
    "given",
    [{"labels": Y}, {}, {"mask": SAME}, {"mask": half(torch.ones(8, 8))}, {"mask": half(SAME)}],
    ids=["labels", "none", "mask", "weights", "some weights"],
)
def test_values_and_gradients(options, views, given):
    ours, truth = OPTIONS[options]
    features = normalize(rows(8, views, 5), dim=-1)
    same(lambda x: SupConLoss(**ours)(x, **given), lambda x: formula(x, **given, **truth), features)


def test_views_of_any_shape():
    features = normalize(rows(8, 2, 3, 4, 2).flatten(2), dim=-1).view(8, 2, 3, 4, 2)
    same(lambda x: SupConLoss()(x, Y), lambda x: formula(x, Y), features)
    assert SupConLoss()(features, Y[:, None]) == SupConLoss()(features, Y)


def test_masks_that_are_labels_make_no_matrix(monkeypatch):
    monkeypatch.setattr(SupConLoss, "_with_mask", None)
    features = rows(8, 2, 3)
    assert SupConLoss()(features, mask=SAME) == SupConLoss()(features, Y)
    # Of one view nobody is its own positive, whatever the diagonal says.
    assert SupConLoss()(features[:, :1], mask=SAME - torch.eye(8)) == SupConLoss()(features[:, :1], Y)
    with pytest.raises(TypeError):
        SupConLoss()(features, mask=SAME - torch.eye(8))


def test_golden_values():
    def stacked(**options):
        return lambda a, b: SupConLoss(0.1, **options)(torch.stack((a, b), 1), Y)

    golden(stacked(), 6.193021, (), Z, KEYS)
    golden(stacked(base_temperature=0.1), 4.335114, (), Z, KEYS)
    golden(stacked(base_temperature=0.1, contrast_mode="one"), 3.945046, (), Z, KEYS)
    # Golden gradients are by rows that still have to be divided by their lengths.
    sizes = torch.arange(1, 9, **DOUBLE)[:, None]
    golden(
        lambda a, b: stacked(base_temperature=0.1, contrast_mode="one")(normalize(a), normalize(b)),
        3.945046,
        (0.632539, 5.367561),
        Z * sizes,
        KEYS / sizes,
    )


def test_rows_without_positives_count_with_zero():
    features = rows(4, 1, 3)
    assert SupConLoss()(features, torch.arange(4)) == 0
    assert SupConLoss()(features) == 0
    loss, grad = gradients(lambda x: SupConLoss()(x), rows(1, 1, 3))
    assert loss == 0 and not grad.any()


@pytest.mark.parametrize("given", [{"labels": Y}, {"mask": half(SAME)}], ids=["labels", "mask"])
def test_float32_and_components(given):
    features = normalize(rows(8, 2, 5), dim=-1)
    loss = SupConLoss(0.01)
    value, grad = gradients(lambda x: loss(x, **given), features.float())
    exact = gradients(lambda x: loss(x, **given), features)
    assert float(value) == pytest.approx(float(exact[0]), rel=1e-5)
    assert (grad - exact[1]).norm() < 1e-5 * exact[1].norm()
    assert loss.last.loss == exact[0] and loss.last.anchors == (16 if "labels" in given else 14)


EXAMPLE = """
# define loss with a temperature `temp`
criterion = SupConLoss(temperature=temp)

# features: [bsz, n_views, f_dim]
# `n_views` is the number of crops from each image
# better be L2 normalized in f_dim dimension
features = features

# SupContrast
loss = criterion(features, labels)
# or SimCLR
loss_simclr = criterion(features)
(loss + loss_simclr).backward()
"""


def test_one_import_line():
    features = normalize(torch.randn(8, 2, 4), dim=-1).requires_grad_()
    given = {"temp": 0.1, "features": features, "labels": Y}
    exec("from mmfast.adapters.supcontrast import SupConLoss" + EXAMPLE, given)
    assert features.grad.any()


X = torch.ones(3, 2, 4)
OP = "supcontrast.SupConLoss: "
INVALID = [
    (lambda: SupConLoss()(X[0]), OP + "features must have shape (B, V, ...), got (2, 4)"),
    (lambda: SupConLoss()(X, Y[:3], SAME), OP + "mask must be None with labels, got both"),
    (lambda: SupConLoss()(X, Y), OP + "labels must have shape (3,), one for each row of features, got (8,)"),
    (lambda: SupConLoss()(X, mask=SAME), OP + "mask must have shape (3, 3), got (8, 8)"),
    (lambda: SupConLoss()(X, mask=torch.full((3, 3), torch.nan)), OP + "mask must be finite, got NaN or infinity"),
    (lambda: SupConLoss(contrast_mode="two"), OP + "contrast_mode must be one of all, one, got 'two'"),
    (lambda: SupConLoss(0), OP + "temperature must be finite and above 0, got 0"),
    (lambda: SupConLoss(base_temperature=-1), OP + "base_temperature must be finite and above 0, got -1"),
    (lambda: SupConLoss()(X, Y[:3] * 0.5), OP + "labels must be integers, got torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), INVALID, ids=[x[1] for x in INVALID])
def test_refusals(call, message):
    with pytest.raises((UserError, TypeError)) as caught:
        call()
    assert str(caught.value) == message
