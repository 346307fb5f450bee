"""The Barlow Twins passes in Triton against the formulas in fp64, pass by pass and put together."""

import pytest
import torch
from triton_help import DEVICE, assert_rounded, inside, red_zones

from mmfast.ops.barlow_twins.definition import Definition
from mmfast.triton import barlow_twins as passes

# fp32 sums over hundreds of rows, and a factor for gradients that are differences of larger terms.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
HALF = [torch.bfloat16, torch.float16]
LAMBD = 0.013


def standardised(z, center, eps):
    """Standardised embedding, r and mean in fp64."""
    z = z.double()
    mean = z.mean(0) if center else torch.zeros_like(z[0])
    d = z - mean
    w = d.square().mean(0) + eps
    r = torch.where(w > 0, w.rsqrt(), w * 0)
    return d * r, r, mean


def oracle(z_a, z_b, lambd, center, eps):
    a, b = (standardised(z, center, eps)[0] for z in (z_a, z_b))
    c = a.T @ b / len(a)
    on = (1 - c.diagonal()).square().sum()
    off = (c - c.diagonal().diag()).square().sum()
    pairs = max(1, len(c) * (len(c) - 1))
    loss = on + lambd * off
    return loss, torch.stack([loss, on, off, c.diagonal().mean(), (off / pairs).sqrt()]).detach()


def embeddings(rows, columns, dtype=torch.float32, offset=0.0):
    z_a = torch.randn(rows, columns, dtype=torch.float64) + offset
    z_b = z_a + 0.7 * torch.randn(rows, columns, dtype=torch.float64)
    return z_a.to(dtype).to(DEVICE), z_b.to(dtype).to(DEVICE)


def both(z_a, z_b, center, eps, gram, upstream=1.0, lambd=LAMBD, wanted=(True, True), in_place=True):
    """Loss, components and gradients by the passes, with the products that the op does between them."""
    definition = Definition(lambd, center, eps)
    hat, statistics = passes.standardise(z_a, z_b, definition, False)
    if gram:
        grams = hat @ hat.mT
        loss, components = passes.gram_loss(grams, statistics, definition)
        products = [grams[1] @ hat[0], grams[0] @ hat[1]]
    else:
        p = hat[0].T @ hat[1]
        loss, components = passes.correlation_loss(p, len(z_a), statistics, definition)
        products = [hat[1] @ p.T, hat[0] @ p]
    products = [m if want else None for m, want in zip(products, wanted, strict=True)]
    in_place = in_place and z_a.dtype == hat.dtype
    grads = [
        m if m is None or in_place else torch.empty_like(m, dtype=z_a.dtype)
        for m in products
    ]  # fmt: skip
    u = torch.tensor(upstream, dtype=hat.dtype, device=DEVICE)
    passes.gradient(products, [hat[0], hat[1]], statistics, u, definition, gram, 0, None, grads)
    return loss, components, grads


def close(actual, expected, dtype, scale=1.0, floor=0.0):
    """Relative to the largest entry, or ``floor``: entries of a gradient are sums with cancellation."""
    tolerance = TOLERANCE[dtype] * scale
    largest = max(float(expected.abs().max()), floor)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance * largest)


@pytest.mark.rotation
@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows, columns", [(3, 1), (5, 130), (16, 64), (67, 70), (400, 5)])
def test_loss_and_gradients(rows, columns, dtype, gram):
    for center, eps in ((True, 1e-5), (False, 0.0)):
        z_a, z_b = (z.requires_grad_() for z in embeddings(rows, columns, dtype))
        loss, components = oracle(z_a, z_b, LAMBD, center, eps)
        expected = torch.autograd.grad(loss, (z_a, z_b), torch.tensor(-2.5, dtype=loss.dtype, device=DEVICE))
        with torch.no_grad(), red_zones():
            actual = both(z_a, z_b, center, eps, gram, -2.5)
        # The Gram form takes the off-diagonal energy for a difference: what cancels has the size of LAMBD.
        close(actual[0], loss.detach(), dtype, floor=LAMBD)
        # The last is the root of that energy, and so of its rounding where there is nothing off the diagonal.
        count = 4 if gram and columns == 1 else 5
        close(actual[1][:count], components[:count], dtype, 5)
        for grad, good in zip(actual[2], expected, strict=True):
            close(grad, good, dtype, 5, floor=LAMBD)


@pytest.mark.parametrize("dtype", HALF)
def test_half_embeddings_in_wide_form(dtype):
    """Not narrow: standardised in fp32, rounded once at the end."""
    z_a, z_b = embeddings(37, 24, dtype)
    leaves = [z.double().requires_grad_() for z in (z_a, z_b)]
    loss, _ = oracle(*leaves, LAMBD, True, 1e-5)
    for gram in (True, False):
        actual, _, grads = both(z_a, z_b, True, 1e-5, gram)
        close(actual, loss.detach(), torch.float32)
        for grad, good in zip(grads, torch.autograd.grad(loss, leaves, retain_graph=True), strict=True):
            assert grad.dtype == dtype
            assert_rounded(grad.cpu(), good.to(dtype).cpu())


@pytest.mark.rotation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("center", [True, False])
def test_standardise(center, dtype):
    narrow = dtype in HALF
    # The tall one has chunks of several tiles, and more of them than are merged at a time.
    for rows, columns in ((2, 9), (70, 72), (1100 if dtype == torch.float32 else 100, 3)):
        z_a, z_b = embeddings(rows, columns, dtype)
        with red_zones():
            hat, statistics = passes.standardise(z_a, z_b, Definition(center=center, eps=1e-3), narrow)
        assert hat.dtype == dtype and hat.shape == (2, rows, columns) and statistics.shape == (5, columns)
        (a, r_a, mean_a), (b, r_b, mean_b) = (standardised(z, center, 1e-3) for z in (z_a, z_b))
        compute = statistics.dtype
        close(statistics, torch.stack([r_a, r_b, 1 - (a * b).mean(0), mean_a, mean_b]), compute)
        if narrow:
            assert_rounded(hat.cpu(), torch.stack([a, b]).to(dtype).cpu())
        else:
            close(hat, torch.stack([a, b]), compute)


def test_offsets_cost_no_precision():
    z_a, z_b = embeddings(300, 20, torch.float32, offset=1e4)
    loss, _ = oracle(z_a, z_b, LAMBD, True, 1e-5)
    close(both(z_a, z_b, True, 1e-5, True)[0], loss, torch.float32)


@pytest.mark.parametrize("gram", [True, False])
def test_views_that_agree(gram):
    """1 - c has no cancellation: the loss of nearly equal views is right, not only small."""
    z_a, _ = embeddings(64, 20)
    z_b = z_a + 1e-4 * torch.randn_like(z_a)
    loss, components = oracle(z_a, z_b, 0.0, True, 1e-8)
    actual, parts, _ = both(z_a, z_b, True, 1e-8, gram, lambd=0.0)
    torch.testing.assert_close(actual.double(), loss, rtol=1e-2, atol=0)
    torch.testing.assert_close(parts[1].double(), components[1], rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_constant_columns(eps, dtype):
    z_a, z_b = embeddings(90, 6, dtype)
    z_a[:, 1], z_b[:, 4] = 1e4, -0.1
    hat, statistics = passes.standardise(z_a, z_b, Definition(eps=eps), dtype in HALF)
    assert (hat[0, :, 1] == 0).all() and (hat[1, :, 4] == 0).all()
    if eps == 0:
        assert statistics[0, 1] == 0 and statistics[1, 4] == 0
        torch.testing.assert_close(statistics[2, [1, 4]], torch.ones(2, device=DEVICE))
        loss, _, grads = both(z_a, z_b, True, eps, True)
        assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
        assert (grads[0][:, 1] == 0).all() and (grads[1][:, 4] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("gram", [True, False])
def test_values_without_a_variance_give_nan(gram, value):
    z_a, z_b = embeddings(40, 7)
    z_a[33, 2] = value
    loss, components, grads = both(z_a, z_b, True, 1e-5, gram)
    assert loss.isnan() and components[:3].isnan().all() and grads[0][:, 2].isnan().all()


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize("gram", [True, False])
def test_one_gradient(gram, wanted):
    z_a, z_b = embeddings(20, 9)
    full = both(z_a, z_b, True, 1e-5, gram)[2]
    with red_zones():
        some = both(z_a, z_b, True, 1e-5, gram, wanted=wanted, in_place=False)[2]
    for grad, good, want in zip(some, full, wanted, strict=True):
        assert grad is None if not want else torch.equal(grad, good)


def test_strides_and_surroundings():
    z_a, z_b = embeddings(50, 40)
    expected = both(z_a, z_b, True, 1e-5, True)
    for change in (
        inside,
        lambda z: z.T.contiguous().T,
        lambda z: torch.cat([z, z * float("nan")], 1)[:, :40],
    ):
        actual = both(change(z_a), change(z_b), True, 1e-5, True)
        assert torch.equal(actual[0], expected[0])
        assert all(torch.equal(a, b) for a, b in zip(actual[2], expected[2], strict=True))
    row = z_a[:1].expand(50, -1)
    hat, _ = passes.standardise(row, z_b, Definition(), False)
    assert (hat[0] == 0).all()


def test_two_runs_are_bit_equal():
    z_a, z_b = embeddings(210, 33)
    first, second = (both(z_a, z_b, True, 1e-5, True) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))


@pytest.mark.parametrize("size", [1, 15, 33, 136])
def test_the_diagonal_of_the_product_becomes_zero(size):
    p = torch.randn(size, size, device=DEVICE)
    statistics = torch.rand(5, size, device=DEVICE)
    before = p.clone()
    with red_zones():
        loss, components = passes.correlation_loss(p, 7, statistics, Definition(lambd=0.5))
    assert torch.equal(p, before.fill_diagonal_(0))
    gap = statistics[2].double()
    on, off = gap.square().sum(), before.double().square().sum() / 49
    close(loss, on + 0.5 * off, torch.float32)
    rms = (off / max(1, size * (size - 1))).sqrt()
    close(components, torch.stack([on + 0.5 * off, on, off, 1 - gap.mean(), rms]), torch.float32)


def test_energies_below_zero_are_zero():
    statistics = torch.zeros(5, 4, device=DEVICE)
    loss, components = passes.gram_loss(
        torch.zeros(2, 3, 3, device=DEVICE), statistics, Definition(lambd=1.0)
    )
    assert components[2] == 0 and loss == 0
    grams = torch.full((2, 3, 3), float("nan"), device=DEVICE)
    _, components = passes.gram_loss(grams, statistics, Definition(lambd=1.0))
    assert components[2].isnan()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 37, 37), (136, 136)])
def test_narrowed(shape, dtype):
    matrices = torch.randn(shape, device=DEVICE) * 1e4
    with red_zones():
        out = passes.narrowed(matrices, dtype, 5)
    eye = torch.eye(shape[-1], dtype=torch.bool, device=DEVICE)
    assert_rounded(out.cpu(), (matrices / 32).masked_fill(eye, 0).to(dtype).cpu())
    assert (out.diagonal(dim1=-2, dim2=-1) == 0).all()


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("dtype", HALF)
def test_narrow_gradient(dtype, gram):
    """The write-out pass on given products, exactly: its own inputs are what the formula gets."""
    rows, columns, exponent, u = 45, 72, 4, 1.7
    z_a, z_b = embeddings(rows, columns, dtype)
    definition = Definition(LAMBD, eps=1e-3)
    _, statistics = passes.standardise(z_a, z_b, definition, True)
    products = list(torch.randn(2, rows, columns, device=DEVICE))
    grams = list(torch.rand(2, rows, rows, device=DEVICE) * 50)
    grads = [torch.empty_like(z) for z in (z_a, z_b)]
    with red_zones():
        upstream = torch.tensor(u, device=DEVICE)
        passes.gradient(
            products,
            [z_a, z_b],
            statistics,
            upstream,
            definition,
            gram,
            exponent,
            grams if gram else None,
            grads,
        )
    r, gap, mean = statistics[:2].double(), statistics[2].double(), statistics[3:].double()
    hats = [(z.double() - mean[i]) * r[i] for i, z in enumerate((z_a, z_b))]
    weight = 2 * u / rows * (gap + (LAMBD if gram else 0) * (1 - gap))
    for i, own in enumerate(hats):
        m = products[i].double() * 2**exponent
        if gram:
            m += grams[i].double().diagonal()[:, None] * own
        g = 2 * LAMBD * u / rows**2 * m - weight * hats[1 - i]
        # The projection on the own column: with 1 - c for the partner's, as in csrc/barlow_twins.h.
        projection = 2 * LAMBD * u / rows**2 * (m * own).mean(0) - weight * (1 - gap)
        expected = r[i] * (g - own * projection)
        assert_rounded(grads[i].cpu(), expected.to(dtype).cpu())


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("dtype", HALF)
def test_narrow_form(dtype, gram):
    """Put together, products on half operands: as good as the operands."""
    rows, columns = (40, 96) if gram else (96, 40)
    z_a, z_b = embeddings(rows, columns, dtype)
    leaves = [z.double().requires_grad_() for z in (z_a, z_b)]
    loss, _ = oracle(*leaves, LAMBD, True, 1e-5)
    definition = Definition(LAMBD)
    hat, statistics = passes.standardise(z_a, z_b, definition, True)
    wide = hat.float()
    if gram:
        grams = wide @ wide.mT
        actual, _ = passes.gram_loss(grams, statistics, definition)
        narrow = passes.narrowed(grams, dtype, 7).float()
        products, own = [narrow[1] @ wide[0], narrow[0] @ wide[1]], [grams[1], grams[0]]
    else:
        p = wide[0].T @ wide[1]
        actual, _ = passes.correlation_loss(p, rows, statistics, definition)
        narrow = passes.narrowed(p, dtype, 7).float()
        products, own = [wide[1] @ narrow.T, wide[0] @ narrow], None
    grads = [torch.empty_like(z) for z in (z_a, z_b)]
    upstream = torch.ones((), device=DEVICE)
    passes.gradient(products, [z_a, z_b], statistics, upstream, definition, gram, 7, own, grads)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), loss.detach(), rtol=4 * ulp, atol=0)
    for grad, good in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
        largest = float(good.abs().max())
        torch.testing.assert_close(grad.double(), good, rtol=4 * ulp, atol=4 * ulp * largest)
