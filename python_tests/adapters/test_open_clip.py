"""ClipLoss and SigLipLoss by open_clip's signatures: its own code where it is, else what it computes."""

import pytest
import torch
from other_libraries import theirs
from similarity_rows import DOUBLE, KEYS, Z, golden, gradients, rows, same
from torch.nn.functional import cross_entropy, logsigmoid

from mmfast.adapters.open_clip import ClipLoss, SigLipLoss
from mmfast.errors import UserError

SCALE, BIAS = torch.tensor(7.0, **DOUBLE), torch.tensor(-3.0, **DOUBLE)


def clip(a, b, scale, bias=0):
    logits = scale * a @ b.T + bias
    target = torch.arange(len(a))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def siglip(a, b, scale, bias):
    signs = 2 * torch.eye(len(a), **DOUBLE) - 1
    return -logsigmoid(signs * (scale * a @ b.T + bias)).sum() / len(a)


@pytest.mark.parametrize("size", [(1, 3), (2, 3), (9, 5), (33, 4)], ids=str)
def test_values_and_gradients(size):
    inputs = rows(*size), rows(*size, seed=2), SCALE, BIAS
    same(ClipLoss(), clip, *inputs)
    same(ClipLoss(), clip, *inputs[:3])
    same(SigLipLoss(), siglip, *inputs)
    same(lambda a, b, s: SigLipLoss()(a, b, s, None), lambda a, b, s: siglip(a, b, s, 0), *inputs[:3])


def test_open_clip_itself():
    code = theirs("open_clip.loss")
    inputs = rows(9, 5), rows(9, 5, seed=2), SCALE, BIAS
    same(ClipLoss(), code.ClipLoss(), *inputs)
    same(SigLipLoss(), code.SigLipLoss(), *inputs)


def test_golden_values():
    golden(lambda a, b: ClipLoss()(a, b, 1 / 0.07), 0.661212, (), Z, KEYS)
    ten = torch.tensor(10.0, **DOUBLE)
    golden(SigLipLoss(), 1.628604, (None, None, 0.0936922, 0.119477), Z, KEYS, ten, -ten)


def test_lengths_are_part_of_the_scores():
    a, b = rows(5, 4), rows(5, 4, seed=2)
    assert ClipLoss()(2 * a, b, 1.0) == pytest.approx(float(ClipLoss()(a, b, 2.0)), rel=1e-12)


def test_half_types_are_computed_in_float32():
    a, b = (x.to(torch.bfloat16) for x in (rows(6, 8), rows(6, 8, seed=2)))
    for loss, formula in ((ClipLoss(), clip), (SigLipLoss(), siglip)):
        value, *grads = gradients(lambda x, y, f=loss: f(x, y, 5.0, -1.0), a, b)
        assert value.dtype == torch.float32 and grads[0].dtype == torch.bfloat16
        assert float(value) == pytest.approx(float(formula(a.double(), b.double(), 5.0, -1.0)), rel=1e-5)


def test_dictionaries_and_components():
    a, b = rows(5, 4), rows(5, 4, seed=2)
    for loss in (ClipLoss(cache_labels=True), SigLipLoss(True, dist_impl="gather", chunk_size=2)):
        found = loss(a, b, SCALE, BIAS, output_dict=True)
        assert list(found) == ["contrastive_loss"]
        assert found["contrastive_loss"] == loss(a, b, SCALE, BIAS) == loss.last.loss
        assert loss.last.anchors == 5 and not loss.state_dict()


EXAMPLE = """
loss = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1)
image_features = image_features / image_features.norm(dim=-1, keepdim=True)
text_features = text_features / text_features.norm(dim=-1, keepdim=True)
losses = loss(image_features, text_features, logit_scale=logit_scale, output_dict=True)
total_loss = sum(losses.values())
total_loss.backward()
"""


def test_one_import_line():
    given = {"image_features": rows(4, 3), "text_features": rows(4, 3, seed=2)}
    scale = SCALE.clone().requires_grad_()
    exec("from mmfast.adapters.open_clip import ClipLoss" + EXAMPLE, given | {"logit_scale": scale})
    assert scale.grad.isfinite() and scale.grad != 0


A = torch.ones(3, 4)
INVALID = [
    (lambda: ClipLoss(local_loss=True), "open_clip.ClipLoss: gather_with_grad must be True with local_loss "
     "(the gradient of the candidates would be missing), got False"),
    (lambda: ClipLoss(use_horovod=True), "open_clip.ClipLoss: use_horovod must be False, got True"),
    (lambda: ClipLoss(rank=1), "open_clip.ClipLoss: rank must be in [0, 0], got 1"),
    (lambda: ClipLoss(1), "open_clip.ClipLoss: local_loss must be True or False, got 1"),
    (lambda: ClipLoss(world_size=2)(A, A, 1.0),
     "open_clip.ClipLoss: world_size must be the number of processes (1), got 2"),
    (lambda: ClipLoss()(A, A[:2], 1.0),
     "open_clip.ClipLoss: text_features must have the 3 rows of image_features, got (2, 4)"),
    (lambda: ClipLoss()(A[0], A, 1.0),
     "open_clip.ClipLoss: image_features must have shape (B, D) with D >= 1, got (4,)"),
    (lambda: ClipLoss()(A, A, "1"),
     "open_clip.ClipLoss: logit_scale must be a number or a scalar tensor, got '1'"),
    (lambda: SigLipLoss(dist_impl="ring"),
     "open_clip.SigLipLoss: dist_impl must be one of bidir, shift, reduce, gather, got 'ring'"),
    (lambda: SigLipLoss(chunk_size=-1), "open_clip.SigLipLoss: chunk_size must be at least 0, got -1"),
    (lambda: SigLipLoss()(A, A.double(), 1.0, 0.0), "open_clip.SigLipLoss: text_features must have the dtype of "
     "image_features (torch.float32), got torch.float64"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), INVALID, ids=[x[1] for x in INVALID])
def test_refusals(call, message):
    with pytest.raises((UserError, TypeError)) as caught:
        call()
    assert str(caught.value) == message
