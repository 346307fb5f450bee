"""The figures of a report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from zlib import crc32

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from mmfast.plots import draw_correlation

# Okabe & Ito's colours, which colour-blind readers can tell apart.
COLOURS = {
    "FS": "#0072B2",
    "SLE": "#56B4E9",
    "SSL": "#D55E00",
    "LE": "#E69F00",
    "ridge": "#009E73",
    "constant": "#7F7F7F",
    "logistic": "#009E73",
    "base_rate": "#7F7F7F",
}
# Panels side by side.
COLUMNS = 3
History = Sequence[Mapping[str, float]]


class _Colours(dict):
    """Those above; of other rows one that is theirs by their name."""

    def __missing__(self, name: str) -> str:
        return ("#CC79A7", "#000000", "#B8A800")[crc32(name.encode()) % 3]


COLOURS = _Colours(COLOURS)


def pretraining_curves(histories: Sequence[History]) -> bytes:
    """Loss, invariance and redundancy of pre-training over epochs."""
    if all("train_mean_diagonal" in epoch for history in histories for epoch in history):
        panels = (
            ("Barlow Twins loss", ("train_loss",)),
            ("mean of the diagonal (1: invariant)", ("train_mean_diagonal",)),
            ("RMS off the diagonal (0: not redundant)", ("train_off_diagonal_rms", "valid_off_diagonal_rms")),
        )
    else:
        panels = (
            ("loss between two views", ("train_loss",)),
            ("mean cosine of two views (1: invariant)", ("train_mean_cosine",)),
            ("effective rank of the vectors", ("valid_effective_rank",)),
        )
    figure, axes = _figure(1, len(panels), 11, 3.2)
    for ax, (title, names) in zip(axes[0], panels, strict=True):
        for name, style in zip(names, ("-", "--"), strict=False):
            if all(name in epoch for history in histories for epoch in history):
                label = "two views, training" if name.startswith("train") else "no augmentation, validation"
                _curves(
                    ax,
                    [[epoch[name] for epoch in history] for history in histories],
                    COLOURS["SSL"],
                    style,
                    label,
                )
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("epoch")
        if len(names) > 1:
            ax.legend(frameon=False, fontsize=8)
    return _png(figure)


def supervised_curves(histories: Mapping[str, Sequence[History]], loss: str) -> bytes:
    """The loss of that name in training and validation over epochs, a panel per methodology."""
    figure, axes = _figure(1, len(histories), 2.75 * len(histories) + 0.6, 3.2, sharex=True, sharey=True)
    for ax, (name, runs) in zip(axes[0], histories.items(), strict=True):
        for key, style, label in (("train_loss", "--", "training"), ("valid_loss", "-", "validation")):
            _curves(ax, [[epoch[key] for epoch in run] for run in runs], COLOURS[name], style, label)
        ax.set(title=name, xlabel="epoch")
        ax.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel(loss)
    return _png(figure)


def correlation_maps(before: Tensor, after: Tensor, shown: int = 64) -> bytes:
    """Cross-correlation (D, D) before and after pre-training: the first dimensions, and all cells as histograms."""
    figure, axes = _figure(1, 3, 11.5, 3.7, width_ratios=(1, 1, 0.95))
    for ax, c, title in zip(
        axes[0], (before, after), ("before pre-training", "after pre-training"), strict=False
    ):
        image = draw_correlation(ax, c[:shown, :shown])
        ax.set(title=title)
    axes[0][1].set_ylabel(None)
    figure.colorbar(image, ax=list(axes[0][:2]), shrink=0.85, label="correlation")
    bins = np.linspace(-1, 1, 81)
    diagonal = np.eye(len(before), dtype=bool)
    for c, colour, when in ((before, "#7F7F7F", "before"), (after, COLOURS["SSL"], "after")):
        for mask, style, where in ((diagonal, "-", "diagonal"), (~diagonal, ":", "off-diagonal")):
            axes[0][2].hist(
                c.numpy()[mask],
                bins,
                density=True,
                histtype="step",
                color=colour,
                linestyle=style,
                label=f"{where}, {when}",
            )
    axes[0][2].set(title="all cells", xlabel="correlation", ylabel="density", xlim=(-1, 1))
    axes[0][2].legend(frameon=False, fontsize=8, loc="upper left")
    return _png(figure)


def scatter(
    predictions: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]], limits: tuple[float, float]
) -> bytes:
    """Predictions against truths, a panel for each row of the table and target: both -> (predictions, truths)."""
    figure, panels = _panels(len(predictions), 3.5, 3.3)
    pad = 0.08 * (limits[1] - limits[0])
    for ax, ((name, target), (p, y)) in zip(panels, predictions.items(), strict=True):
        ax.plot(limits, limits, color="#98a3b3", linewidth=1, zorder=1)
        alpha = float(np.clip(60 / len(p), 0.15, 0.7))
        ax.scatter(y, np.clip(p, *limits), s=14, color=COLOURS[name], alpha=alpha, linewidths=0, zorder=2)
        ax.set(
            title=f"{name}, {target}" if target else name,
            xlim=(limits[0] - pad, limits[1] + pad),
            ylim=(limits[0] - pad, limits[1] + pad),
        )
        ax.set_aspect("equal")
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel("prediction")
    for ax in panels[-COLUMNS:]:
        ax.set_xlabel("truth")
        ax.tick_params(labelbottom=True)
    return _png(figure)


def confusion(predicted: Mapping[str, tuple[np.ndarray, np.ndarray]], classes: Sequence[str]) -> bytes:
    """Classes predicted of each true class, a panel for each row of the table: name -> (predictions, truths)."""
    count = len(classes)
    size = 1.6 + 0.5 * count
    figure, panels = _panels(len(predicted), size + 0.3, size)
    for ax, (name, (p, y)) in zip(panels, predicted.items(), strict=True):
        table = np.zeros((count, count))
        np.add.at(table, (y, p), 1)
        shares = table / np.maximum(table.sum(1, keepdims=True), 1)
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.ndindex(count, count):
            colour = "white" if shares[i, j] > 0.6 else "#1c2430"
            text = f"{100 * shares[i, j]:.0f}" if table[i].any() else "-"
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
        ax.set_title(name)
        ax.spines[:].set_visible(False)
        ax.set_xticks(range(count), classes, rotation=45, ha="right")
        ax.set_yticks(range(count), classes)
        ax.tick_params(length=0)
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel("truth")
    for ax in panels[-COLUMNS:]:
        ax.set_xlabel("prediction")
        ax.tick_params(labelbottom=True)
    return _png(figure)


def per_label(values: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Of each label a bar for each row of the table, and each run as a dot: row -> label -> one value per run."""
    labels = list(next(iter(values.values())))
    figure, axes = _figure(1, 1, max(6, 1.4 + 0.22 * len(labels) * (len(values) + 1)), 3.2)
    ax, width = axes[0][0], 0.84 / len(values)
    for row, (name, found) in enumerate(values.items()):
        for k, label in enumerate(labels):
            x = k + (row - (len(values) - 1) / 2) * width
            bar = ax.bar(x, np.mean(found[label]), width=0.92 * width, color=COLOURS[name], alpha=0.6)
            if k == 0:
                bar.set_label(name)
            if len(found[label]) > 1:
                ax.scatter(
                    [x] * len(found[label]), found[label], s=7, color="#1c2430", linewidths=0, zorder=3
                )
    ax.set_xticks(range(len(labels)), labels)
    ax.set(ylabel="F1", ylim=(0, 1))
    ax.legend(frameon=False, fontsize=8, ncols=len(values), loc="upper center")
    return _png(figure)


def comparison(
    values: Mapping[str, Mapping[str, Sequence[float]]],
    intervals: Mapping[str, Mapping[str, tuple[float, float]]],
) -> bytes:
    """Per metric: each run as a dot, the mean as a bar, the interval over test samples as a whisker.

    Args:
        values: metric -> row -> one value per run.
        intervals: metric -> row -> (low, high).
    """
    figure, axes = _figure(1, len(values), 4.6 * len(values), 3.1)
    for ax, (metric, rows) in zip(axes[0], values.items(), strict=True):
        for x, (name, runs) in enumerate(rows.items()):
            ax.bar(x, np.mean(runs), width=0.62, color=COLOURS[name], alpha=0.55)
            low, high = intervals[metric][name]
            ax.vlines(x, low, high, color="#1c2430", linewidth=1.2)
            offsets = np.linspace(-0.16, 0.16, len(runs)) if len(runs) > 1 else [0]
            ax.scatter(
                x + np.asarray(offsets),
                runs,
                s=16,
                color=COLOURS[name],
                edgecolors="#1c2430",
                linewidths=0.6,
                zorder=3,
            )
        ax.set_xticks(range(len(rows)), list(rows))
        ax.set_title(metric)
        ax.axhline(0, color="#1c2430", linewidth=0.8)
    return _png(figure)


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """As many panels in rows of ``COLUMNS`` at most, that share their axes."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure, axes = _figure(rows, columns, width * columns, height * rows, sharex=True, sharey=True)
    panels = list(axes.flat)
    for ax in panels[count:]:
        ax.remove()
    return figure, panels[:count]


def _figure(rows: int, columns: int, width: float, height: float, **options) -> tuple[Figure, np.ndarray]:
    """Without pyplot, whose figures are global and may open windows."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    return figure, axes


def _curves(ax: Axes, runs: Sequence[Sequence[float]], colour: str, style: str, label: str) -> None:
    """Each run thin, and their mean; a run that has stopped stays in it with its last value.

    Without it the mean would jump where one stops.
    """
    for run in runs:
        ax.plot(range(1, len(run) + 1), run, color=colour, linestyle=style, linewidth=0.6, alpha=0.35)
    longest = max(map(len, runs))
    mean = np.mean([[*run, *[run[-1]] * (longest - len(run))] for run in runs], axis=0)
    ax.plot(range(1, longest + 1), mean, color=colour, linestyle=style, linewidth=1.8, label=label)
    ax.xaxis.get_major_locator().set_params(integer=True)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
