"""Embeddings that are not finite are refused by the names that the other library gives them, at their own row."""

import math

import pytest
import torch

from mmfast import backends
from mmfast.adapters import lightly, open_clip, solo, supcontrast
from mmfast.adapters import pytorch_metric_learning as pml
from mmfast.adapters import sentence_transformers as st
from mmfast.errors import UserError

Y = torch.arange(8) % 3
TUPLE = torch.tensor([0, 5]), torch.tensor([3, 2]), torch.tensor([1, 1])


def with_references(loss):
    return lambda a, b: loss(a, Y, ref_emb=b, ref_labels=Y.clone())


# Called with rows a and b, of which a row is wrong: who says so, and what a and b are called.
CALLS = {
    "ntxent": (lightly.NTXentLoss(), "lightly.NTXentLoss", "out0", "out1"),
    "bank": (lightly.NTXentLoss(memory_bank_size=(16, 4)), "lightly.NTXentLoss", "out0", "out1"),
    "dcl": (lightly.DCLLoss(), "lightly.DCLLoss", "out0", "out1"),
    "dclw": (lightly.DCLWLoss(), "lightly.DCLWLoss", "out0", "out1"),
    "vicreg": (lightly.VICRegLoss(), "lightly.VICRegLoss", "z_a", "z_b"),
    "clip": (lambda a, b: open_clip.ClipLoss()(a, b, 10.0), "open_clip.ClipLoss", "image_features", "text_features"),
    "clip 1": (
        lambda a, b: open_clip.ClipLoss()(a[2:3], b[2:3], 10.0),
        "open_clip.ClipLoss", "image_features", "text_features",
    ),
    "siglip": (
        lambda a, b: open_clip.SigLipLoss()(a, b, 10.0, -10.0),
        "open_clip.SigLipLoss", "image_features", "text_features",
    ),
    "siglip 1": (
        lambda a, b: open_clip.SigLipLoss()(a[2:3], b[2:3], 10.0, -10.0),
        "open_clip.SigLipLoss", "image_features", "text_features",
    ),
    "simclr": (lambda a, b: solo.simclr_loss_func(a, Y), "solo.simclr_loss_func", "z", None),
    "supcontrast": (
        lambda a, b: supcontrast.SupConLoss()(torch.stack((a, b), 1)),
        "supcontrast.SupConLoss", "features[:, 0]", "features[:, 1]",
    ),
    "mask": (
        lambda a, b: supcontrast.SupConLoss()(torch.stack((a, b), 1), mask=torch.arange(64.0).view(8, 8)),
        "supcontrast.SupConLoss", "features[:, 0]", "features[:, 1]",
    ),
    "ranking": (
        lambda a, b: st.multiple_negatives_ranking([a, a.nan_to_num(), a.nan_to_num(), b]),
        "sentence_transformers.multiple_negatives_ranking", "embeddings[0]", "embeddings[3]",
    ),
    "batch_all": (
        lambda a, b: st.batch_all_triplet(Y, a), "sentence_transformers.batch_all_triplet", "embeddings", None
    ),
    "batch_hard": (
        lambda a, b: st.batch_hard_triplet(Y, a), "sentence_transformers.batch_hard_triplet", "embeddings", None
    ),
    "pml": (lambda a, b: pml.NTXentLoss()(a, Y), "pytorch_metric_learning.NTXentLoss", "embeddings", None),
    "pml triplets": (
        lambda a, b: pml.TripletMarginLoss()(a, Y), "pytorch_metric_learning.TripletMarginLoss", "embeddings", None
    ),
    "pml pairs": (lambda a, b: pml.NPairsLoss()(a, Y), "pytorch_metric_learning.NPairsLoss", "embeddings", None),
    "pml references": (
        with_references(pml.SupConLoss()), "pytorch_metric_learning.SupConLoss", "embeddings", "ref_emb"
    ),
    "pml triplets of references": (
        with_references(pml.TripletMarginLoss()),
        "pytorch_metric_learning.TripletMarginLoss", "embeddings", "ref_emb",
    ),
    "pml tuple": (
        lambda a, b: pml.SupConLoss()(a, indices_tuple=TUPLE),
        "pytorch_metric_learning.SupConLoss", "embeddings", None,
    ),
    "pml memory": (
        lambda a, b: pml.CrossBatchMemory(pml.NTXentLoss(), 4)(a, Y),
        "pytorch_metric_learning.CrossBatchMemory", "embeddings", None,
    ),
    "pml views": (
        pml.SelfSupervisedLoss(pml.NTXentLoss()),
        "pytorch_metric_learning.SelfSupervisedLoss", "embeddings", "ref_emb",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("name", CALLS)
def test_names(name, wrong):
    call, op, *names = CALLS[name]
    for which, argument in enumerate(names):
        if argument is None:
            continue
        rows = [torch.randn(8, 4) for _ in "ab"]
        rows[which][2, 1] = wrong
        with pytest.raises(UserError) as caught:
            call(*rows)
        assert str(caught.value).startswith(
            f"{op}: {argument} must be finite, got 1 NaN or infinite values of "
        )
        assert str(caught.value).endswith("column 1") and f"row {0 if ' 1' in name else 2}," in str(
            caught.value
        )


def test_a_memory_takes_no_rows_that_were_refused():
    memory = pml.CrossBatchMemory(pml.NTXentLoss(), 4, 16)
    with pytest.raises(UserError):
        memory(torch.full((8, 4), math.nan), Y)
    assert not memory.queue.filled


@pytest.mark.parametrize("size", [200.0, 3e4])
def test_single_rows_of_half_types_have_a_loss_of_zero(size):
    """Sums of their numbers overflow."""
    a, b = (torch.full((1, 64), size, dtype=torch.float16, requires_grad=True) for _ in "ab")
    one = torch.zeros(1, dtype=torch.long)
    for call in (
        lambda: open_clip.ClipLoss()(a, b, 10.0),
        lambda: st.multiple_negatives_ranking([a, b]),
        lambda: st.batch_all_triplet(one, a),
        lambda: pml.NTXentLoss()(a, one),
        lambda: pml.TripletMarginLoss()(a, one),
        lambda: supcontrast.SupConLoss()(a[:, None]),
    ):
        loss = call()
        (grad,) = torch.autograd.grad(loss, a)
        assert loss == 0 and loss.dtype == torch.float32 and not grad.any()


def test_a_forced_backend_that_is_not_there_is_no_matter_of_values(monkeypatch):
    monkeypatch.setitem(backends._WHY_NOT, "triton", lambda device: "it is not here")
    a, b = (torch.randn(8, 4) for _ in "ab")
    for call in (lightly.BarlowTwinsLoss(), lightly.NTXentLoss(), lightly.VICRegLoss()):
        with (
            backends.backend("triton"),
            pytest.raises((UserError, RuntimeError), match="triton backend was asked for, but"),
        ):
            call(a, b)
