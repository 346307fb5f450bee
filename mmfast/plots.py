"""The cross-correlation of two views, to look at."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmfast.errors import UserError
from mmfast.files import write_atomically
from mmfast.losses.barlow_twins import barlow_twins_components
from mmfast.ops.barlow_twins.checks import check_views, compute_dtype

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


def plot_cross_correlation(z_a: Tensor, z_b: Tensor, to: str | os.PathLike | Axes, shown: int = 256) -> Axes:
    """Heat map of the cross-correlation of two views' embeddings: a red diagonal on white where training is done.

    The title has the mean of the diagonal and the RMS off the diagonal, of all features. Of more than ``shown``
    features an evenly spaced choice is drawn, and the title says so: no D x D matrix is needed. Colours go from -1
    to 1 in every plot. Features with values that are not finite are grey and left out of the numbers; constant ones
    correlate with nothing.

    >>> plot_cross_correlation(z_a, z_b, "correlation.png")

    Args:
        z_a, z_b: (B, D), B >= 2, on one device and of one dtype: float32, float64, bfloat16 or float16.
        to: the path of an image (.png, .pdf, .svg, ...), which is either whole or not there, or matplotlib's axes.
        shown: at most as many features are drawn.

    Returns:
        The axes, whose first image is the heat map.

    Raises:
        UserError: embeddings of other shapes, ``shown`` < 1, an image format that matplotlib does not write, a path
            that cannot be written, or no matplotlib.
        TypeError: unequal or unsupported dtypes.
    """
    check_views({"z_a": z_a, "z_b": z_b}, corresponding=True, op="plot_cross_correlation")
    if shown < 1:
        raise UserError(f"plot_cross_correlation: shown must be at least 1, got {shown}")
    z_a, z_b = (z.detach().to(compute_dtype(z)) for z in (z_a, z_b))
    figure, axes = _figure(to) if isinstance(to, (str, os.PathLike)) else (None, to)
    features = z_a.shape[1]
    count = min(features, shown)
    # The middles of as many equal parts.
    chosen = ((torch.arange(count, device=z_a.device) + 0.5) * features / count).long()
    image = draw_correlation(axes, correlation_matrix(z_a[:, chosen], z_b[:, chosen]), features)
    axes.figure.colorbar(image, ax=axes, shrink=0.85, label="correlation")
    axes.set_title(_summary(z_a, z_b, count), fontsize=10)
    if figure is not None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=_format(to), dpi=130)
        write_atomically(to, buffer.getbuffer())
    return axes


@torch.no_grad()
def correlation_matrix(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Pearson's correlation (D, D) of the features of two views (B, D): 0 for constant ones, NaN if not finite."""

    def standardise(z):
        # Relative to the first row, an offset costs no precision, and what is constant is zero.
        z = z - z[0]
        z = z - z.mean(0)
        norm = torch.linalg.vector_norm(z, dim=0)
        return z / torch.where(norm == 0, 1, norm)

    return standardise(z_a).T @ standardise(z_b)


def draw_correlation(axes: Axes, c: Tensor, features: int | None = None) -> AxesImage:
    """Heat map of correlations (n, n), n evenly spaced ones of as many ``features`` (default n); NaN is grey."""
    end = (features or len(c)) - 0.5
    image = axes.imshow(
        c.detach().cpu().float().numpy(),
        cmap="RdBu_r",
        vmin=-1,
        vmax=1,
        interpolation="nearest",
        extent=(-0.5, end, end, -0.5),
    )
    axes.set_facecolor("0.6")
    axes.set(xlabel="feature of view 2", ylabel="feature of view 1")
    axes.spines[:].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return image


def _summary(z_a: Tensor, z_b: Tensor, drawn: int) -> str:
    features = z_a.shape[1]
    finite = (z_a.isfinite() & z_b.isfinite()).all(0)
    usable = int(finite.sum())
    mean, rms = "undefined", "undefined"
    if usable:
        parts = barlow_twins_components(z_a[:, finite], z_b[:, finite], eps=0.0, stats=None)
        mean, rms = f"{float(parts.mean_diagonal):.3f}", f"{float(parts.off_diagonal_rms):.3f}"
    lines = [f"mean diagonal {mean}, off-diagonal RMS {rms}"]
    if drawn < features:
        lines.append(f"{drawn} of {features} features drawn, evenly spaced")
    if usable < features:
        lines.append(f"grey: not finite ({features - usable} of {features} features)")
    return "\n".join(lines)


def _figure(path: str | os.PathLike):
    """A figure and its axes, without pyplot, whose figures are global and may open windows."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "plot_cross_correlation: drawing needs matplotlib, install mmfast[train] or matplotlib"
        ) from None
    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    known = FigureCanvasAgg(figure).get_supported_filetypes()
    if _format(path) not in known:
        choices = ", ".join(f".{name}" for name in sorted(known))
        raise UserError(f"plot_cross_correlation: to must end in one of {choices}, got {os.fspath(path)!r}")
    return figure, figure.subplots()


def _format(path: str | os.PathLike) -> str:
    return Path(path).suffix[1:].lower()
