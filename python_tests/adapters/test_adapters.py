"""The call signatures of other projects give the numbers of their formulas; lightly's own where it is installed."""

import copy
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from barlow_twins_formulas import FORMULAS, gradients, relative_error, views

from mmfast.adapters import lifestream, lightly, monai, official, solo, vissl


def same(ours, truth, tolerance=1e-12):
    assert float(ours[0]) == pytest.approx(float(truth[0]), rel=tolerance)
    assert all(relative_error(x, y) < 5 * tolerance for x, y in zip(ours[1:], truth[1:], strict=True))


PAIRS = {
    "lightly": (lightly.BarlowTwinsLoss(), FORMULAS["lightly"]),
    "lightly lambda": (lightly.BarlowTwinsLoss(lambda_param=0.3), lambda a, b: FORMULAS["lightly"](a, b, 0.3)),
    "lightly gathered": (lightly.BarlowTwinsLoss(gather_distributed=True), FORMULAS["lightly"]),
    "solo": (solo.barlow_loss_func, FORMULAS["solo"]),
    "solo options": (
        lambda a, b: solo.barlow_loss_func(a, b, lamb=0.3, scale_loss=0.5),
        lambda a, b: 20 * FORMULAS["solo"](a, b, 0.3),
    ),
    "official": (official.BarlowTwins(torch.nn.Identity(), torch.nn.Identity()),
                 lambda a, b: FORMULAS["official"](a, b, 0.0051)),
    "monai": (monai.BarlowTwinsLoss(), FORMULAS["monai"]),
    "monai lambda": (
        lambda a, b: monai.BarlowTwinsLoss(lambd=0.3)(input=a, target=b),
        lambda a, b: FORMULAS["monai"](a, b, 0.3),
    ),
    "vissl": (
        lambda a, b: vissl.BarlowTwinsCriterion(0.0051, 0.024, embedding_dim=30)(torch.cat([a, b])),
        FORMULAS["vissl"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients(name):
    ours, formula = PAIRS[name]
    z = views(12, 30)
    same(gradients(ours, *z, -2.0), gradients(formula, *z, -2.0))


def lifestream_formula(z, lambd):
    c = z[0::2].T @ z[1::2] / (len(z) // 2)
    off = c - c.diagonal().diag()
    return (c.diagonal() - 1).square().sum() + lambd * off.square().sum()


def test_interleaved_rows():
    z = torch.stack(views(12, 30), 1).flatten(0, 1).double()
    target = torch.arange(12).repeat_interleave(2)
    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss = lifestream.BarlowTwinsLoss(0.02)(x, target)
    truth = lifestream_formula(y, 0.02)
    loss.backward()
    truth.backward()
    assert float(loss.detach()) == pytest.approx(float(truth.detach()), rel=1e-12)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)


def test_the_model_that_returns_its_loss():
    torch.manual_seed(1)
    backbone, projector = torch.nn.Linear(6, 8), torch.nn.Linear(8, 20)
    model = official.BarlowTwins(backbone, projector, lambd=0.01).double()
    y1, y2 = (torch.randn(9, 6, dtype=torch.float64) for _ in range(2))
    other = copy.deepcopy(model)
    model(y1, y2).backward()
    FORMULAS["official"](*(other.projector(other.backbone(y)) for y in (y1, y2)), 0.01).backward()
    for ours, truth in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, truth.grad, rtol=1e-9, atol=1e-12)
    assert {name.partition(".")[0] for name in model.state_dict()} == {"backbone", "projector"}


def lightly_itself():
    path = os.environ.get("MMFAST_LIGHTLY")
    if not path:
        package = importlib.util.find_spec("lightly")
        if package is None:
            pytest.skip(
                "lightly is not installed, and MMFAST_LIGHTLY does not name its loss/barlow_twins_loss.py"
            )
        path = Path(package.submodule_search_locations[0]) / "loss/barlow_twins_loss.py"
    spec = importlib.util.spec_from_file_location("lightly_barlow_twins_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BarlowTwinsLoss


@pytest.mark.parametrize("shape", [(12, 50), (40, 17)], ids=str)
def test_lightly_itself(shape):
    theirs, z = lightly_itself(), views(*shape)
    for options in ({}, {"lambda_param": 0.3}):
        truth = gradients(theirs(**options), *z, -2.0)
        same(gradients(lightly.BarlowTwinsLoss(**options), *z, -2.0), truth)
        same(gradients(lightly.BarlowTwinsLoss(**options), *z, -2.0, torch.float32), truth, 2e-6)


CRITERION = vissl.BarlowTwinsCriterion(0.0051, 0.024, embedding_dim=6)
LIFESTREAM = lifestream.BarlowTwinsLoss(0.005)
Z = torch.arange(24.0).view(4, 6)
ROWS = "lifestream.BarlowTwinsLoss: model_outputs and target must have one even number of rows, got "
FEW = "must have at least 2 rows (a correlation over one sample is undefined), got (1, 6)"
VISSL, SOLO = "vissl.BarlowTwinsCriterion: ", "solo.barlow_loss_func: "
MONAI, LIGHTLY = "monai.BarlowTwinsLoss: ", "lightly.BarlowTwinsLoss: "
INVALID = [
    (lambda: CRITERION(Z[:3]), "embedding must have an even number of rows and 6 columns, got (3, 6)"),
    (lambda: CRITERION(Z[:, :5]), "embedding must have an even number of rows and 6 columns, got (4, 5)"),
    (lambda: CRITERION(Z[0]), "embedding must have an even number of rows and 6 columns, got (6,)"),
    (lambda: LIFESTREAM(Z[:3], torch.zeros(3)), ROWS + "3 and 3"),
    (lambda: LIFESTREAM(Z, torch.zeros(2)), ROWS + "4 and 2"),
    (
        lambda: LIFESTREAM(Z, torch.tensor([1, 1, 2, 3])),
        "target must be the same in rows 2 i and 2 i + 1, got 2 and 3 in rows 2 and 3",
    ),
    (lambda: CRITERION(Z.log()), "embedding[:2] must be finite, got 1 NaN or infinite values of 12, the first (-inf) "
     "in row 0, column 0"),
    (lambda: CRITERION(Z[:2]), f"embedding[:1] {FEW}"),
    (lambda: CRITERION([Z]), f"{VISSL}embedding must be a tensor, got list"),
    (lambda: vissl.BarlowTwinsCriterion("0.1", 1.0, 6), f"{VISSL}lambda_ must be a number, got '0.1'"),
    (lambda: vissl.BarlowTwinsCriterion(0.1, -1, 6), f"{VISSL}scale_loss must be finite and at least 0, got -1"),
    (lambda: vissl.BarlowTwinsCriterion(0.1, 1.0, 6.0), f"{VISSL}embedding_dim must be an integer, got 6.0"),
    (lambda: LIFESTREAM(Z / 0, torch.zeros(4)), "model_outputs[::2] must be finite, got 12 "
     "NaN or infinite values of 12, the first (nan) in row 0, column 0"),
    (lambda: LIFESTREAM(Z.to_sparse(), torch.zeros(4)), "lifestream.BarlowTwinsLoss: model_outputs must be a dense "
     "tensor (torch.strided), got a tensor that is torch.sparse_coo"),
    (lambda: lifestream.BarlowTwinsLoss(None), "lifestream.BarlowTwinsLoss: lambd must be a number, got None"),
    (lambda: monai.BarlowTwinsLoss()(Z, Z[:3]), f"{MONAI}target must have the shape of input (4, 6), got (3, 6)"),
    (lambda: monai.BarlowTwinsLoss()(input=Z, target=Z.half()),
     f"{MONAI}target must have the dtype of input (torch.float32), got torch.float16"),
    (lambda: monai.BarlowTwinsLoss()(Z, Z / 0), f"{MONAI}target must be finite, got 24 NaN or infinite values of 24, "
     "the first (nan) in row 0, column 0"),
    (lambda: monai.BarlowTwinsLoss(lambd=-1), f"{MONAI}lambd must be finite and at least 0, got -1"),
    (lambda: solo.barlow_loss_func(Z, Z[:3]), f"{SOLO}z2 must have the shape of z1 (4, 6), got (3, 6)"),
    (lambda: solo.barlow_loss_func(Z[:1], Z[:1]), f"{SOLO}z1 {FEW}"),
    (lambda: solo.barlow_loss_func(Z, Z, lamb="1"), f"{SOLO}lamb must be a number, got '1'"),
    (lambda: solo.barlow_loss_func(Z, Z, scale_loss=float("nan")),
     f"{SOLO}scale_loss must be finite and at least 0, got nan"),
    (lambda: official.BarlowTwins(torch.nn.Identity(), torch.nn.Flatten(0))(Z, Z),
     "official.BarlowTwins: z1 must have shape (B, D), got (24,)"),
    (lambda: lightly.BarlowTwinsLoss()(Z, None), f"{LIGHTLY}z_b must be a tensor, got None"),
    (lambda: lightly.BarlowTwinsLoss("0.1"), f"{LIGHTLY}lambda_param must be a number, got '0.1'"),
    (lambda: lightly.BarlowTwinsLoss(gather_distributed=2),
     f"{LIGHTLY}gather_distributed must be True or False, got 2"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), INVALID, ids=[x[1] for x in INVALID])
def test_invalid_arguments_have_the_names_of_the_other_library(call, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value).endswith(message)


def test_lightly_gathers_only_where_there_is_torch_distributed(monkeypatch):
    """lightly's own two tests: ValueError at construction without it, and one look."""
    for available in (True, False):
        looks = []
        monkeypatch.setattr(torch.distributed, "is_available", lambda a=available, n=looks: n.append(1) or a)
        if available:
            lightly.BarlowTwinsLoss(gather_distributed=True)
        else:
            with pytest.raises(ValueError, match="gather_distributed must be False"):
                lightly.BarlowTwinsLoss(gather_distributed=True)
        assert len(looks) == 1


MODULES = {
    "lightly": (lightly.BarlowTwinsLoss(), lambda f, a, b: f(a, b)),
    "monai": (monai.BarlowTwinsLoss(), lambda f, a, b: f(a, b)),
    "official": (official.BarlowTwins(torch.nn.Identity(), torch.nn.Identity()), lambda f, a, b: f(a, b)),
    "vissl": (vissl.BarlowTwinsCriterion(0.0051, 0.024, 30), lambda f, a, b: f(torch.cat((a, b)))),
    "lifestream": (
        lifestream.BarlowTwinsLoss(0.01),
        lambda f, a, b: f(torch.stack((a, b), 1).flatten(0, 1), torch.zeros(2 * len(a))),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_keep_the_components_of_the_latest_call(name):
    module, call = MODULES[name]
    z_a, z_b = views(12, 30)
    loss = call(module, z_a.requires_grad_(), z_b)
    assert float(module.last.loss) == float(loss.detach()) and not module.last.loss.requires_grad
    assert module.last.mean_diagonal.isfinite() and module.last.off_diagonal_rms > 0
    assert not module.state_dict()
