"""Effective rank and the plot of the cross-correlation."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from targets import KERNELS

import mmfast
from mmfast import plot_cross_correlation, plots
from mmfast.functional import effective_rank

SHAPES = pytest.mark.parametrize("shape", [(20, 90), (90, 20), (30, 30), (2, 7), (9, 1)], ids=str)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}


def embeddings(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return z * torch.linspace(0.1, 3, columns, dtype=torch.float64)


def shares(z):
    """Eigenvalues of the covariance, summing to 1."""
    values = torch.linalg.svdvals(z.double() - z.double().mean(0)).square()
    return values / values.sum()


# Effective rank.


@SHAPES
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_effective_rank_is_the_participation_ratio(shape, dtype):
    z = embeddings(*shape).to(dtype)
    rank = effective_rank(z.requires_grad_())
    assert rank.shape == () and not rank.requires_grad
    assert rank.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(rank) == pytest.approx(1 / float(shares(z.detach()).square().sum()), rel=TOLERANCES[dtype])


@SHAPES
def test_entropies_are_never_below(shape):
    z = embeddings(*shape)
    p = shares(z)
    singular = p.sqrt() / p.sqrt().sum()
    ranks = [float(effective_rank(z)), *(float(torch.special.entr(q).sum().exp()) for q in (p, singular))]
    assert ranks == sorted(ranks) and 1 - 1e-12 <= ranks[0] <= min(shape[0] - 1, shape[1]) + 1e-12
    # As different as they should be, where there is more than one direction.
    assert min(shape) <= 2 or ranks[1] > 1.1 * ranks[0]


@pytest.mark.parametrize("shape", [(64, 8), (64, 300)], ids=str)
def test_even_directions_are_counted(shape):
    z = torch.linalg.qr(embeddings(64, 9))[0]
    z = torch.linalg.qr(z - z.mean(0))[0][:, :5]
    z = torch.nn.functional.pad(z, (0, shape[1] - 5)) @ torch.linalg.qr(embeddings(shape[1], shape[1]))[0]
    assert float(effective_rank(z)) == pytest.approx(5, rel=1e-9)


@SHAPES
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_scale_and_offset_cost_no_precision(shape, scale, offset):
    z = (embeddings(*shape).float() + offset) * scale
    assert float(effective_rank(z)) == pytest.approx(1 / float(shares(z).square().sum()), rel=1e-5)


@pytest.mark.parametrize("shape", [(20, 90), (90, 20)], ids=str)
def test_without_variance_the_rank_is_zero_and_without_numbers_none(shape):
    z = embeddings(*shape)[:1].expand(shape)
    for dtype in TOLERANCES:
        assert float(effective_rank(z.to(dtype))) == 0
    for bad in (float("nan"), float("inf")):
        z = embeddings(*shape)
        z[3, 4] = bad
        assert effective_rank(z).isnan()


def test_rank_in_training_code():
    z = embeddings(20, 90).float()
    expected = effective_rank(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(effective_rank(z), expected)
    compiled = torch.compile(effective_rank, fullgraph=True, backend="aot_eager")
    assert float(compiled(z)) == pytest.approx(float(expected), rel=1e-6)
    assert torch.equal(effective_rank(z.t().contiguous().t()), expected)


@pytest.mark.skipif(("cuda", "cuda") not in KERNELS, reason="no CUDA kernels for a GPU here")
def test_rank_waits_for_no_gpu():
    z = embeddings(20, 90).float()
    there = z.cuda()
    effective_rank(there)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rank = effective_rank(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(rank) == pytest.approx(float(effective_rank(z)), rel=1e-5)


SHAPE = "z must have shape (B, D), B >= 2 and D >= 1, got "
INVALID = [
    (TypeError, [[1.0]], "z must be a tensor, got list"),
    (ValueError, torch.ones(3), SHAPE + "(3,)"),
    (ValueError, torch.ones(1, 3), SHAPE + "(1, 3)"),
    (ValueError, torch.ones(3, 0), SHAPE + "(3, 0)"),
    (TypeError, torch.ones(3, 3).long(), "z must be one of float32, float64, bfloat16, float16, got int64"),
]


@pytest.mark.parametrize(("error", "z", "message"), INVALID, ids=[x[2] for x in INVALID])
def test_embeddings_without_a_rank(error, z, message):
    with pytest.raises(error) as caught:
        effective_rank(z)
    assert str(caught.value) == f"effective_rank: {message}"


# The plot.


def views(rows, columns):
    z = embeddings(rows, columns, seed=1)
    return z, z + embeddings(rows, columns, seed=2)


def cells(axes):
    return axes.images[0].get_array().filled(np.nan)


@pytest.fixture
def axes():
    return Figure().subplots()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_map_is_the_correlation(axes, dtype):
    z_a, z_b = (z.to(dtype) for z in views(40, 12))
    z_a[:, 3] = 7.0
    assert plot_cross_correlation(z_a, z_b, axes) is axes
    both = np.hstack([z_a.double().numpy(), z_b.double().numpy()])
    with np.errstate(invalid="ignore"):
        truth = np.nan_to_num(np.corrcoef(both.T)[:12, 12:])
    np.testing.assert_allclose(cells(axes), truth, atol=1e-6)
    off = truth[~np.eye(12, dtype=bool)]
    numbers = f"mean diagonal {np.trace(truth) / 12:.3f}, off-diagonal RMS {np.sqrt(np.mean(off**2)):.3f}"
    assert axes.get_title() == numbers
    assert axes.images[0].get_clim() == (-1, 1)


def test_of_wide_embeddings_an_even_choice_is_drawn(axes):
    z_a, z_b = views(20, 1000)
    plot_cross_correlation(z_a, z_b, axes, shown=10)
    chosen = range(50, 1000, 100)
    truth = plots.correlation_matrix(z_a, z_b)[chosen][:, chosen]
    np.testing.assert_allclose(cells(axes), truth, atol=1e-6)
    assert axes.images[0].get_extent() == [-0.5, 999.5, 999.5, -0.5]
    parts = mmfast.functional.barlow_twins_components(z_a, z_b, eps=0.0)
    numbers = f"mean diagonal {parts.mean_diagonal:.3f}, off-diagonal RMS {parts.off_diagonal_rms:.3f}"
    assert axes.get_title() == numbers + "\n10 of 1000 features drawn, evenly spaced"


def test_no_matrix_of_all_features_is_made(axes):
    z_a, z_b = (torch.randn(16, 16384) for _ in range(2))
    with torch.profiler.profile(profile_memory=True) as profile:
        plot_cross_correlation(z_a, z_b, axes)
    largest = max(event.cpu_memory_usage for event in profile.events())
    # A view is 1 MB, a matrix of all features 1 GB.
    assert largest <= 3 * z_a.nbytes


def test_features_that_are_not_finite_are_grey_and_left_out(axes):
    z_a, z_b = views(40, 12)
    kept = [j for j in range(12) if j not in (2, 5)]
    parts = mmfast.functional.barlow_twins_components(z_a[:, kept], z_b[:, kept], eps=0.0)
    z_a[7, 2], z_b[0, 5] = float("nan"), float("inf")
    plot_cross_correlation(z_a, z_b, axes)
    numbers = f"mean diagonal {parts.mean_diagonal:.3f}, off-diagonal RMS {parts.off_diagonal_rms:.3f}"
    assert axes.get_title() == numbers + "\ngrey: not finite (2 of 12 features)"
    grey = np.zeros((12, 12), bool)
    grey[2], grey[:, 5] = True, True
    np.testing.assert_array_equal(np.isnan(cells(axes)), grey)
    plot_cross_correlation(z_a * torch.nan, z_b, axes)
    assert axes.get_title().startswith("mean diagonal undefined, off-diagonal RMS undefined\n")


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("PDF", b"%PDF"), ("svg", b"<?xml")])
def test_images_of_any_format(tmp_path, suffix, magic):
    path = tmp_path / "new" / f"plot.{suffix}"
    axes = plot_cross_correlation(*views(40, 12), path)
    assert path.read_bytes().startswith(magic) and len(axes.images) == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    plot_cross_correlation(*views(40, 1), str(path))


@pytest.mark.parametrize("name", ["plot", "plot.docx"])
def test_an_unknown_format_writes_nothing(tmp_path, name):
    with pytest.raises(
        mmfast.UserError, match=rf"^plot_cross_correlation: to must end in one of .*\.png.*{name}'$"
    ):
        plot_cross_correlation(*views(40, 12), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "plot.png"
    plot_cross_correlation(*views(40, 12), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(mmfast.UserError, match="No space left on device"):
        plot_cross_correlation(*views(40, 30), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["plot.png"]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((*views(4, 3), "x.png"), {"shown": 0}, "plot_cross_correlation: shown must be at least 1, got 0"),
        (
            (torch.ones(3), torch.ones(3), "x.png"),
            {},
            "plot_cross_correlation: z_a must have shape (B, D), got (3,)",
        ),
    ],
)
def test_invalid_arguments(arguments, options, message):
    with pytest.raises(mmfast.UserError if options else ValueError) as caught:
        plot_cross_correlation(*arguments, **options)
    assert str(caught.value) == message


def test_without_matplotlib_one_sentence_says_so():
    code = (
        "import sys; sys.modules['matplotlib'] = None; import mmfast, torch; z = torch.randn(4, 3)\n"
        "try: mmfast.plot_cross_correlation(z, z, 'x.png')\n"
        "except mmfast.UserError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == (
        "plot_cross_correlation: drawing needs matplotlib, install mmfast[train] or matplotlib\n"
    )
