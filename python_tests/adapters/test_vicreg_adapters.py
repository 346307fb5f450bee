"""VICReg under the names of lightly and solo-learn: their formulas, and their own code where it is installed."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
import vicreg_formulas
from barlow_twins_formulas import gradients, relative_error

from mmfast.adapters import lightly, solo


def draw(rows, columns):
    generator = torch.Generator().manual_seed(rows)
    a, b = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    size = torch.linspace(0.4, 1.3, columns, dtype=torch.float64)
    return a * size, (a + 0.4 * b) * size.flip(0) + 0.2


def same(ours, truth, tolerance=1e-12):
    assert float(ours[0]) == pytest.approx(float(truth[0]), rel=tolerance)
    assert all(relative_error(x, y) < 5 * tolerance for x, y in zip(ours[1:], truth[1:], strict=True))


PAIRS = {
    "lightly": (lightly.VICRegLoss(), vicreg_formulas.official),
    "lightly options": (
        lightly.VICRegLoss(lambda_param=2, mu_param=3, nu_param=0.5, eps=1e-2),
        lambda a, b: vicreg_formulas.official(a, b, 2, 3, 0.5, eps=1e-2),
    ),
    "lightly gathered": (lightly.VICRegLoss(25, 25, 1, True, 1e-4), vicreg_formulas.official),
    "solo": (solo.vicreg_loss_func, vicreg_formulas.solo),
    "solo options": (
        lambda a, b: solo.vicreg_loss_func(a, b, sim_loss_weight=2, var_loss_weight=3, cov_loss_weight=0.5),
        lambda a, b: vicreg_formulas.solo(a, b, 2, 3, 0.5),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("shape", [(12, 30), (30, 12)], ids=str)
def test_values_and_gradients(name, shape):
    ours, formula = PAIRS[name]
    z = draw(*shape)
    same(gradients(ours, *z, -2.0), gradients(formula, *z, -2.0))


def itself(package, file, variable):
    """A module of another project: by itself, without what its package imports."""
    path = os.environ.get(variable)
    if not path:
        found = importlib.util.find_spec(package)
        if found is None:
            pytest.skip(f"{package} is not installed, and {variable} does not name its {file}")
        path = Path(found.submodule_search_locations[0]) / file
    spec = importlib.util.spec_from_file_location(f"{package}_vicreg", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        pytest.skip(f"{package}: {error}")
    return module


def theirs(name):
    if name == "lightly":
        return itself("lightly", "loss/vicreg_loss.py", "MMFAST_LIGHTLY_VICREG").VICRegLoss()
    return itself("solo", "losses/vicreg.py", "MMFAST_SOLO_VICREG").vicreg_loss_func


@pytest.mark.parametrize("name", ["lightly", "solo"])
@pytest.mark.parametrize("shape", [(12, 50), (40, 17)], ids=str)
def test_their_own_code(name, shape):
    function, (ours, _), z = theirs(name), PAIRS[name], draw(*shape)
    truth = gradients(function, *z, -2.0)
    same(gradients(ours, *z, -2.0), truth)
    rounded = [x.float().double() for x in z]
    same(gradients(ours, *z, -2.0, torch.float32), gradients(function, *rounded, -2.0), 2e-6)


def test_components():
    loss = lightly.VICRegLoss()
    assert loss.last is None
    z = draw(9, 7)
    loss(*z)
    torch.testing.assert_close(torch.stack(loss.last[1:]), torch.stack(vicreg_formulas.terms(*z)))


Z = torch.arange(24.0).view(4, 6)
FEW = "must have at least 2 rows (a correlation over one sample is undefined), got (1, 6)"
SOLO, LIGHTLY = "solo.vicreg_loss_func: ", "lightly.VICRegLoss: "
INVALID = [
    (lambda: lightly.VICRegLoss()(Z[:1], Z[:1]), f"{LIGHTLY}z_a {FEW}"),
    (lambda: lightly.VICRegLoss()(Z, None), f"{LIGHTLY}z_b must be a tensor, got None"),
    (lambda: lightly.VICRegLoss()(Z[None], Z[None]), f"{LIGHTLY}z_a must have shape (B, D), got (1, 4, 6)"),
    (lambda: lightly.VICRegLoss("1"), f"{LIGHTLY}lambda_param must be a number, got '1'"),
    (lambda: lightly.VICRegLoss(mu_param=-1), f"{LIGHTLY}mu_param must be finite and at least 0, got -1"),
    (lambda: lightly.VICRegLoss(nu_param=None), f"{LIGHTLY}nu_param must be a number, got None"),
    (lambda: lightly.VICRegLoss(eps=-1.0), f"{LIGHTLY}eps must be finite and at least 0, got -1.0"),
    (lambda: lightly.VICRegLoss(gather_distributed=2), f"{LIGHTLY}gather_distributed must be True or False, got 2"),
    (lambda: solo.vicreg_loss_func(Z[:1], Z[:1]), f"{SOLO}z1 {FEW}"),
    (lambda: solo.vicreg_loss_func(Z, Z[:3]), f"{SOLO}z2 must have the shape of z1 (4, 6), got (3, 6)"),
    (lambda: solo.vicreg_loss_func(Z, Z / 0), f"{SOLO}z2 must be finite, got 24 NaN or infinite values of 24, "
     "the first (nan) in row 0, column 0"),
    (lambda: solo.vicreg_loss_func(Z, Z, cov_loss_weight="1"), f"{SOLO}cov_loss_weight must be a number, got '1'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), INVALID, ids=[x[1] for x in INVALID])
def test_invalid_arguments_have_the_names_of_the_other_library(call, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value) == message
