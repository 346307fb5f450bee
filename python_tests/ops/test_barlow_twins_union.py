"""What the definition implies, for every published variant; memory by formula; export; peers where installed.

Values, dtypes, forms and refusals are tested beside the loss and its variants: here is what holds for all of them.
"""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from barlow_twins_formulas import FORMULAS, gradients, relative_error, views
from barlow_twins_help import FORMS
from targets import BACKENDS
from torch import nn

import mmfast
from mmfast import functional as F
from mmfast.data import collate, synthetic
from mmfast.losses.barlow_twins import barlow_twins_options
from mmfast.models import M3Encoder, Projector
from mmfast.ops.barlow_twins import op as ops

VARIANTS = pytest.mark.parametrize("variant", list(FORMULAS))
# On both sides of the choice of form.
SHAPES = pytest.mark.parametrize("shape", [(12, 50), (40, 17)], ids=str)
# The root over the variance plus eps, or the deviation plus eps: the power of a scale that eps goes with.
POWER = {name: 1 if name in ("monai", "stable-pretraining") else 2 for name in FORMULAS}
UNBIASED = [name for name in FORMULAS if barlow_twins_options(name).get("unbiased")]


def loss_of(variant, **options):
    return lambda a, b: F.barlow_twins(a, b, variant=variant, **options)


def same(ours, truth, tolerance):
    assert float(ours[0]) == pytest.approx(float(truth[0]), rel=tolerance)
    for x, y in zip(ours[1:], truth[1:], strict=True):
        assert relative_error(x, y) < 10 * tolerance


def double(*shape, **options):
    return tuple(z.double() for z in views(*shape, **options))


# 1. The definition.


def by_hand(z_a, z_b, variant):
    """Loops over Python's floats."""
    options = {"eps_outside": False, "unbiased": False, "divide": True, "pooled": False}
    options |= barlow_twins_options(variant)
    rows = len(z_a)
    columns = [z_a.double().T.tolist(), z_b.double().T.tolist()]

    def moments(x):
        mean = math.fsum(x) / len(x)
        variance = math.fsum((y - mean) ** 2 for y in x) / (len(x) - options["unbiased"])
        eps = options["eps"]
        return mean, math.sqrt(variance) + eps if options["eps_outside"] else math.sqrt(variance + eps)

    hats = []
    for view in columns:
        hats.append([])
        for i, x in enumerate(view):
            mean, divisor = moments(columns[0][i] + columns[1][i] if options["pooled"] else x)
            hats[-1].append([(y - mean) / divisor for y in x])
    loss = 0.0
    for i, x in enumerate(hats[0]):
        for j, y in enumerate(hats[1]):
            c = math.fsum(p * q for p, q in zip(x, y, strict=True)) / (rows if options["divide"] else 1)
            loss += (1 - c) ** 2 if i == j else options["lambd"] * c**2
    return options["scale"] * loss


@BACKENDS
@VARIANTS
@pytest.mark.parametrize("shape", [(2, 1), (2, 6), (6, 1), (9, 14), (14, 9)], ids=str)
def test_the_definition_written_out(shape, variant, backend):
    z_a, z_b = views(*shape)
    truth = by_hand(z_a, z_b, variant)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 4e-6)):
        loss = F.barlow_twins(z_a.to(dtype), z_b.to(dtype), variant=variant)
        # Where views agree the loss is what rounding leaves of 1 - c.
        assert float(loss) == pytest.approx(truth, rel=tolerance, abs=tolerance * 1e-2)


# 2. Gradients.


@VARIANTS
@SHAPES
def test_one_view_may_need_no_gradient(shape, variant):
    z_a, z_b = views(*shape)
    truth = gradients(FORMULAS[variant], z_a, z_b)
    for index in range(2):
        z = [x.double().requires_grad_(i == index) for i, x in enumerate((z_a, z_b))]
        F.barlow_twins(*z, variant=variant).backward()
        assert z[1 - index].grad is None
        assert relative_error(z[index].grad, truth[1 + index]) < 1e-11


@VARIANTS
def test_losses_within_one_graph(variant):
    """A vector of upstream gradients, inputs that are used again, and a second backward."""
    z_a, z_b = (z.requires_grad_() for z in double(12, 50))
    _, grad_a, grad_b = gradients(FORMULAS[variant], z_a, z_b)
    first = F.barlow_twins(z_a, z_b, variant=variant)
    losses = torch.stack([first, F.barlow_twins(z_b, z_a, variant=variant), first * 0.5])
    upstream = torch.tensor([2.0, -3.0, 4.0], dtype=torch.float64)
    losses.backward(upstream, retain_graph=True)
    assert relative_error(z_a.grad, grad_a) < 1e-11 and relative_error(z_b.grad, grad_b) < 1e-11
    losses.backward(upstream)
    assert relative_error(z_a.grad, 2 * grad_a) < 1e-11 and relative_error(z_b.grad, 2 * grad_b) < 1e-11


# 3. Metamorphic relations.


@VARIANTS
@SHAPES
def test_affine_maps_of_features(shape, variant):
    z_a, z_b = double(*shape)
    scale = torch.linspace(0.5, 20, shape[1], dtype=torch.float64)
    offset = torch.linspace(-50, 80, shape[1], dtype=torch.float64)
    plain = gradients(loss_of(variant, eps=0.0), z_a, z_b)
    # Pooled statistics undo what is done to both views alike only.
    mapped = z_a * scale + offset, (z_b * scale + offset if variant == "vissl" else z_b * 3 - 1)
    loss, grad_a, grad_b = gradients(loss_of(variant, eps=0.0), *mapped)
    other = scale if variant == "vissl" else 3
    same((loss, grad_a * scale, grad_b * other), plain, 1e-10)


@BACKENDS
@VARIANTS
@SHAPES
def test_permutations_of_rows_and_features(shape, variant, backend):
    z_a, z_b = double(*shape)
    loss, grad_a, grad_b = gradients(loss_of(variant), z_a, z_b)
    rows, columns = torch.randperm(shape[0]), torch.randperm(shape[1])
    permuted = gradients(loss_of(variant), z_a[rows][:, columns], z_b[rows][:, columns])
    same(permuted, (loss, grad_a[rows][:, columns], grad_b[rows][:, columns]), 1e-11)


@BACKENDS
@VARIANTS
@SHAPES
def test_views_may_be_exchanged(shape, variant, backend):
    z_a, z_b = double(*shape)
    loss, grad_a, grad_b = gradients(loss_of(variant), z_a, z_b)
    same(gradients(loss_of(variant), z_b, z_a), (loss, grad_b, grad_a), 1e-11)


@VARIANTS
@SHAPES
def test_repeated_rows(shape, variant):
    """They leave C as it is, but for the rows that unbiased variances are told of."""
    z_a, z_b = double(*shape)
    once, twice = (
        F.barlow_twins_components(z_a.repeat(n, 1), z_b.repeat(n, 1), variant=variant, eps=0.0)
        for n in (1, 2)
    )
    rows = shape[0]
    factor = (2 * rows - 1) / (2 * rows - 2) if variant in UNBIASED else 1
    assert float(twice.mean_diagonal) == pytest.approx(factor * float(once.mean_diagonal), rel=1e-11)
    assert float(twice.off_diagonal) == pytest.approx(factor**2 * float(once.off_diagonal), rel=1e-10)
    if variant == "thesis":
        # The one whose loss knows B: of the same C it is another.
        assert float(twice.loss) > 3 * float(once.loss)
    elif factor == 1:
        assert float(twice.loss) == pytest.approx(float(once.loss), rel=1e-11)


@BACKENDS
@VARIANTS
@SHAPES
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_a_scale_is_another_eps(shape, scale, variant, backend):
    """L(s z; eps) is L(z; eps / s) of deviations, L(z; eps / s^2) of variances, and s times the gradient its."""
    z_a, z_b = double(*shape)
    eps = barlow_twins_options(variant)["eps"]
    truth = gradients(loss_of(variant, eps=eps / scale ** POWER[variant]), z_a, z_b)
    loss, grad_a, grad_b = gradients(loss_of(variant), z_a * scale, z_b * scale)
    same((loss, grad_a * scale, grad_b * scale), truth, 1e-10)


@BACKENDS
@VARIANTS
@SHAPES
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_scale_and_offset_cost_single_precision_nothing(shape, scale, offset, variant, backend):
    z_a, z_b = (z * scale + offset for z in views(*shape))
    truth = gradients(FORMULAS[variant], z_a, z_b)
    ours = gradients(loss_of(variant), z_a, z_b, dtype=torch.float32)
    if variant == "lightning" and (scale, offset) == (1e-3, 1e4):
        # At 1e4 fp32 has steps of 1e-3: features are a few of these, or constant, where the formula is 0 / 0.
        assert all(x.isfinite().all() for x in ours)
        return
    assert float(ours[0]) == pytest.approx(float(truth[0]), rel=4e-6)
    assert all(relative_error(x, y) < 4e-5 for x, y in zip(ours[1:], truth[1:], strict=True))


@BACKENDS
@VARIANTS
@SHAPES
def test_a_row_of_zeros_is_a_row(shape, variant, backend):
    z_a, z_b = (z + 3 for z in views(*shape))
    z_a[4] = 0
    same(
        gradients(loss_of(variant), z_a, z_b, dtype=torch.float32),
        gradients(FORMULAS[variant], z_a, z_b),
        4e-6,
    )


@BACKENDS
@VARIANTS
def test_embeddings_of_zeros(variant, backend):
    z = torch.zeros(4, 6)
    loss, *grads = gradients(loss_of(variant), z, z, dtype=torch.float32)
    # On the diagonal 1 - 0, times B^2 (1 / B)^2 where C is not divided.
    assert float(loss) == pytest.approx(6 * barlow_twins_options(variant)["scale"], rel=1e-6)
    assert not any(g.any() for g in grads)


@BACKENDS
@VARIANTS
@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_alignment_do_not_matter(shape, dtype, variant, backend):
    z = [x.to(dtype) for x in views(*shape)]
    rows, columns = shape
    plain = gradients(loss_of(variant), *z, dtype=dtype)

    def inside(x, row_step, column_step):
        """x as a slice of a buffer that is NaN everywhere else, at an odd address."""
        buffer = torch.full((rows * row_step + 5, columns * column_step + 7), math.nan, dtype=dtype)
        return buffer[3:, 5:][: rows * row_step : row_step, : columns * column_step : column_step].copy_(x)

    for a, b in (
        (inside(z[0], 1, 1), inside(z[1], 3, 1)),
        (inside(z[0], 2, 2), z[1].T.contiguous().T),
    ):
        a, b = a.requires_grad_(), b.requires_grad_()
        loss = F.barlow_twins(a, b, variant=variant)
        loss.backward()
        ours = [x.double() for x in (loss.detach(), a.grad, b.grad)]
        if variant == "vissl":
            # Statistics of both views together are PyTorch's sums, whose order goes by the strides.
            same(ours, plain, torch.finfo(dtype).eps)
        else:
            assert all(torch.equal(x, y) for x, y in zip(ours, plain, strict=True))


# 6. Memory.


@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("needs", [(True, True), (True, False)], ids=["both", "one"])
def test_bytes_saved_for_backward(needs, dtype, gram):
    """On the CPU: what is standardised or, if that is less, the inputs; 5 D statistics; min(B^2, D^2) terms."""
    rows, columns = (24, 300) if gram else (300, 24)
    z = [x.to(dtype).requires_grad_(need) for x, need in zip(views(rows, columns), needs, strict=True)]
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.barlow_twins(*z)
    matrices = sum(needs) * rows**2 if gram else columns**2
    assert sum(storages.values()) == 2 * z[0].nbytes + (5 * columns + matrices) * loss.element_size()


# VmHWM, for ru_maxrss begins with the peak of the parent.
PEAK = """
import sys, torch
from mmfast.functional import barlow_twins
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
rows, columns, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
torch.set_num_threads(2)
for shape in ((60, 90), (90, 60), (rows, columns)):
    z = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2)]
    before = peak()
    barlow_twins(*z).backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(256, 16384), (16384, 256)], ids=str)
def test_peak_bytes(shape, dtype):
    """Of a whole process: standardised copies, gradients and products, B D each; no max(B, D)^2 = 1 GiB."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, shape), dtype], capture_output=True, text=True, check=True
    )
    size = 4 * shape[0] * shape[1]
    gradients = 2 * size * getattr(torch, dtype).itemsize / 4
    assert 0.9 * gradients < 1024 * int(run.stdout) < 7 * size + 2 * 4 * min(shape) ** 2 + 2**24


# 7. Tools of PyTorch.


class Twins(nn.Module):
    def __init__(self, variant):
        super().__init__()
        self.layer, self.loss = nn.Linear(6, 20), mmfast.BarlowTwinsLoss(variant=variant)

    def forward(self, a, b):
        return self.loss(self.layer(a), self.layer(b))


@VARIANTS
@pytest.mark.filterwarnings("ignore:The tensor attribute self.loss._last was assigned during export")
def test_export(variant):
    """Values, for any number of rows of the form that is chosen; for pooled statistics that of the example."""
    module, x = Twins(variant), (torch.randn(9, 6), torch.randn(9, 6))
    rows = {} if variant == "vissl" else {0: torch.export.Dim("rows", min=2, max=14)}
    exported = torch.export.export(module, x, dynamic_shapes=(rows, rows))
    # Pooled statistics take the road of many views, in which no single op is all.
    ops_used = {str(node.target) for node in exported.graph.nodes}
    assert variant == "vissl" or "mmfast.barlow_twins_forward.default" in ops_used
    for batch in (x, [z[:5] for z in x] if rows else x):
        # What is exported holds the forward pass only.
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(*batch), module(*batch), rtol=1e-6, atol=0)


# 9. Learning.


def pretrain(loss, steps=30):
    """Losses of a short multimodal pre-training with everything that is random fixed."""
    torch.manual_seed(5)
    features = {"text": 12, "audio": 8, "visual": 6}
    data = synthetic(64, max_length=8, missing=0.1, corrupt=0.0, features=features).train
    encoder = M3Encoder(features, hidden=8, dropout=0.1)
    model = nn.ModuleList([encoder, Projector(encoder.out_features, [32, 48])])
    augment = mmfast.TwoViews(
        [mmfast.GaussianNoise(0.1, p=0.9), mmfast.SeqAug(0.2)], [mmfast.TimeMask(0.3, p=0.6)]
    )
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    curve = []
    for step in range(steps):
        batch = collate([data[(step * 24 + i) % len(data)] for i in range(24)])
        both = augment(batch.values, batch.lengths, ids=batch.ids, seed=step, padding=batch.padding)
        value = loss(*(model[1](model[0](view, batch.lengths, batch.padding)) for view in both))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        curve.append(float(value.detach()))
    return curve


def test_multimodal_pretraining_follows_the_reference():
    ours, reference = (
        pretrain(mmfast.BarlowTwinsLoss(lambd=0.02)),
        pretrain(lambda a, b: ops.reference(a, b, lambd=0.02)),
    )
    assert ours[-1] < 0.8 * ours[0]
    assert ours[:3] == pytest.approx(reference[:3], rel=1e-5)
    # Adam magnifies rounding differences from step to step.
    assert ours == pytest.approx(reference, rel=1e-2)


# Peers where they are installed (lightly: test_adapters.py). Their files are loaded alone: packages import much.

# Package: file, its loss, and what it can be compared in: monai's lambd is float32, solo's statistics are.
PEERS = {
    "monai": ("losses/barlow_twins.py", lambda m: m.BarlowTwinsLoss(), torch.float64, 1e-7),
    "solo": ("losses/barlow.py", lambda m: m.barlow_loss_func, torch.float32, 4e-6),
    "catalyst": ("contrib/losses/contrastive.py", lambda m: m.BarlowTwinsLoss(), torch.float64, 1e-11),
}


@SHAPES
@pytest.mark.parametrize("variant", PEERS)
def test_peers_themselves(shape, variant):
    package = importlib.util.find_spec(variant)
    if package is None:
        pytest.skip(f"{variant} is not installed")
    file, loss, dtype, tolerance = PEERS[variant]
    path = Path(package.submodule_search_locations[0]) / file
    spec = importlib.util.spec_from_file_location(f"{variant}_barlow_twins", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    z = views(*shape)
    truth = gradients(loss(module), *z, -2.0, dtype)
    same(gradients(loss_of(variant), *z, -2.0, dtype), truth, tolerance)
