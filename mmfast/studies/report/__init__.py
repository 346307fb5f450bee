"""The report of an experiment."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from mmfast.data import MultimodalData
from mmfast.files import write_atomically, write_json
from mmfast.metrics import shown
from mmfast.studies.experiment import TITLES, Outcome, Unit, units_of
from mmfast.studies.report import plots
from mmfast.studies.report.correlation import before_and_after
from mmfast.studies.report.document import (
    Block,
    Code,
    Facts,
    Figure,
    Heading,
    Table,
    Text,
    to_html,
    to_markdown,
)
from mmfast.studies.report.facts import facts
from mmfast.studies.report.verdict import LINEAR, Means, Resampled, difference, verdict
from mmfast.studies.statistics import bootstrap, compared, interval, summarise
from mmfast.tasks import Task
from mmfast.training.config import Config, ExperimentConfig
from mmfast.training.fitting import LAST
from mmfast.training.folder import ENVIRONMENT, load_result
from mmfast.training.methods import methods_of
from mmfast.training.parsing import load_yaml
from mmfast.training.splits import load_data, make_splits
from mmfast.training.stages import PRETRAINING
from mmfast.training.task import task_of_data

# key -> (heading, factor, decimals) of the metrics that a main table may have.
COLUMNS = {
    "corr": ("Corr", 1, 3),
    "mae": ("MAE", 1, 3),
    "ccc": ("CCC", 1, 3),
    **{key: (key.capitalize(), 100, 1) for key in ("acc2", "f1", "acc3", "acc5", "acc7")},
    "ua": ("UA", 100, 1),
    "accuracy": ("Acc (WA)", 100, 1),
    "jaccard": ("Jaccard", 100, 1),
    **{f"f1_{key}": (f"F1 {key}", 100, 1) for key in ("micro", "macro", "weighted")},
    "auc": ("AUC", 1, 3),
}
# What the names in the table of all metrics mean.
LEGEND = {
    "acc2_has0": "has0: x >= 0 on both sides.",
    "acc2_gt0": "gt0: x > 0 on both sides.",
    "f1_as_published": "f1_as_published: weighted by predicted counts.",
    "acc7_cmu": "acc7_cmu: seven classes rounded away from zero.",
    "ccc": "ccc: concordance correlation.",
    "jaccard_empty1": "jaccard_empty1: where both sets are empty it counts 1.",
    "exact_match": "exact_match: share of samples whose sets are equal.",
}
# Differences worth an interval of their own: what pre-training adds, and what a network adds to a linear model.
PAIRS = (
    *(("SSL", "FS"), ("LE", "SLE")),
    *((network, linear) for linear in LINEAR for network in ("FS", "SSL")),
)

Outcomes = Mapping[str, Sequence[Outcome]]


class Report(NamedTuple):
    """Where the report is, and for a terminal its verdict and what of its main table fits 80 columns."""

    path: Path
    verdict: str
    table: str


def write_report(config: Config, experiment: ExperimentConfig, outcomes: Outcomes, command: str) -> Report:
    """Write ``report.html`` (self-contained), ``report.md`` with ``plots/``, ``results.json`` and ``results.csv``.

    ``command`` is the line that ran the experiment.
    """
    root = Path(config.run.folder)
    data = load_data(config.data)
    units = units_of(config, experiment, data)
    task = task_of_data(config.task, data)
    main = main_table(outcomes, task)
    resampled = _resampled(outcomes, task)
    left_out = _left_out(data)
    means = _means(outcomes, resampled)
    says = verdict([name for name, runs in outcomes.items() if runs[0].trained], means, resampled)
    title = f"Experiment on {data.name}"
    titles = TITLES | {name: method.title for name, method in methods_of(experiment.methods).items()}
    blocks: list[Block] = [
        Heading(title, 1),
        Text(says, "verdict"),
        Facts(facts(config, data, units, outcomes, command)),
        Heading("Results"),
        main,
        Text("; ".join(f"{name}: {titles[name]}" for name in outcomes) + "."),
        *_best_table(outcomes, task),
        *_fold_table(data, outcomes, task),
        _interval_table(outcomes, resampled, left_out),
        *_differences(outcomes, means, resampled, left_out),
        *_figures(config, data, task, outcomes, resampled, units, root),
        Heading("All metrics"),
        *_appendix(outcomes, task),
        Heading("Configuration"),
        Code(yaml.safe_dump({**asdict(config), "experiment": asdict(experiment)}, sort_keys=False)),
        Heading("Environment"),
        Code(yaml.safe_dump(load_yaml(root / ENVIRONMENT), sort_keys=False)),
    ]
    for block in blocks:
        if isinstance(block, Figure):
            write_atomically(root / block.name, block.png)
    write_atomically(root / "report.md", to_markdown(blocks))
    write_atomically(root / "report.html", to_html(title, blocks))
    write_json(root / "results.json", _results(outcomes))
    write_atomically(root / "results.csv", _csv(outcomes))
    return Report(root / "report.html", says, main.text())


def main_table(outcomes: Outcomes, task: Task) -> Table:
    """Mean and standard deviation of the main metrics."""
    keys = task.main
    rows = [[name, str(len(runs)), *(_cell(key, runs) for key in keys)] for name, runs in outcomes.items()]
    kinds = "Accuracies and F1" if task.name != "multilabel" else "Jaccard and F1"
    percent = f" {kinds} in percent." if any(COLUMNS[key][1] == 100 for key in keys) else ""
    return Table(
        ["", "n", *(COLUMNS[key][0] for key in keys)],
        rows,
        f"Mean ± standard deviation over n seeds; - where undefined.{percent} {task.note}".rstrip(),
    )


def _cell(key: str, runs: Sequence[Outcome]) -> str:
    _, factor, decimals = COLUMNS[key]
    summary = summarise(key, [run.metrics[key] for run in runs])
    mean, std = (shown(x, decimals, factor) for x in (summary.mean, summary.std))
    return mean if summary.n == 1 or mean == "-" else f"{mean} ± {std}"


def _best_table(outcomes: Outcomes, task: Task) -> list[Block]:
    keys = task.main
    rows = []
    for name, runs in outcomes.items():
        if (best := best_run(runs)) is not None:
            numbers = (
                shown(best.metrics[key], decimals, factor)
                for key in keys
                for _, factor, decimals in [COLUMNS[key]]
            )
            rows.append([f"{name}, seed {best.seed}", f"{_valid_loss(best):.3f}", *numbers])
    caption = (
        f"The best run of each network, chosen by its validation loss ({task.loss_title}, mean over folds), not by "
        "any of the test metrics beside it, which are all of that one run."
    )
    header = ["", f"validation {task.loss_title}", *(COLUMNS[key][0] for key in keys)]
    return [Table(header, rows, caption)] if rows else []


def best_run(runs: Sequence[Outcome]) -> Outcome | None:
    """The run of lowest validation loss; None for a single run, and for baselines, which have no such loss."""
    if len(runs) < 2 or any("valid_loss" not in result for run in runs for result in run.results):
        return None
    return min(runs, key=_valid_loss)


def _valid_loss(run: Outcome) -> float:
    return float(np.mean([result["valid_loss"] for result in run.results]))


def _means(outcomes: Outcomes, resampled: Resampled) -> Means:
    return {
        key: {name: float(np.mean([run.metrics[key] for run in runs])) for name, runs in outcomes.items()}
        for key in resampled
    }


def _resampled(outcomes: Outcomes, task: Task) -> Resampled:
    """metric -> row -> its bootstrap distribution over test samples, mean over seeds; rows share the resamples."""
    # Test samples and folds are the same for all rows and seeds, in one order.
    truths = next(iter(outcomes.values()))[0].truths.astype(float)
    metrics, decided = compared(task)
    predictions = {
        name: decided(np.stack([run.predictions for run in runs]).astype(float))
        for name, runs in outcomes.items()
    }
    return {
        key: {name: bootstrap(p, truths, metric) for name, p in predictions.items()}
        for key, metric in metrics.items()
    }


def _left_out(data: MultimodalData) -> str | None:
    """What is left out in each fold, such as a speaker; None where that is no group."""
    return getattr(data.protocol and data.protocol.spec, "group", None)


def _fold_table(data: MultimodalData, outcomes: Outcomes, task: Task) -> list[Block]:
    """Mean and standard deviation over the folds of which each leaves a group out."""
    if (group := _left_out(data)) is None:
        return []
    rows = []
    for name, runs in outcomes.items():
        cells = []
        for key in task.main:
            _, factor, decimals = COLUMNS[key]
            folds = np.mean([[result["metrics"][key] for result in run.results] for run in runs], axis=0)
            mean, std = (shown(x, decimals, factor) for x in (folds.mean(), folds.std(ddof=1)))
            cells.append(f"{mean} ± {std}")
        rows.append([name, str(len(folds)), *cells])
    caption = (
        f"Fold by fold: mean ± standard deviation over the folds, each with one {group} as test samples, of the mean "
        f"over seeds. It says how much one {group} differs from another. Folds share training samples, so they are "
        "not independent, and no interval is made of them."
    )
    return [Table(["", "folds", *(COLUMNS[key][0] for key in task.main)], rows, caption)]


def _rests_on(left_out: str | None) -> str:
    """What intervals over test samples take for granted where each fold leaves a group out."""
    if left_out is None:
        return ""
    return (
        f" Samples of one {left_out} are alike and networks of several folds have seen the same samples, so "
        f"intervals over samples hold for these {left_out}s and networks, and are too narrow for others."
    )


def _interval_table(outcomes: Outcomes, resampled: Resampled, left_out: str | None) -> Table:
    header, rows = [""], [[name] for name in outcomes]
    for key in resampled:
        header += [f"{COLUMNS[key][0]}, over samples", f"{COLUMNS[key][0]}, over seeds"]
        for row, (name, runs) in zip(rows, outcomes.items(), strict=True):
            summary = summarise(key, [run.metrics[key] for run in runs])
            row += [_interval(*interval(resampled[key][name])), _interval(summary.low, summary.high)]
    return Table(
        header,
        rows,
        "95 % intervals of the mean. Over samples: bootstrap of the test samples, what another test set of this size "
        "might give. Over seeds: what other seeds might give on these samples, by Student's t, on Fisher's z for "
        "correlations, the logarithm for errors and the logit for shares, lest an interval leave the metric's range; "
        f"- below 3 seeds.{_rests_on(left_out)}",
    )


def _differences(outcomes: Outcomes, means: Means, resampled: Resampled, left_out: str | None) -> list[Block]:
    rows = []
    for a, b in PAIRS:
        if a in outcomes and b in outcomes:
            row = [f"{a} - {b}"]
            for key in resampled:
                found = difference(key, a, b, means, resampled)
                row += [shown(found.mean, 3, sign="+"), _interval(found.low, found.high)]
            rows.append(row)
    header = ["", *(cell for key in resampled for cell in (COLUMNS[key][0], "95 % interval"))]
    caption = (
        "Differences of means, with intervals by paired bootstrap of the test samples. An interval that holds 0 "
        f"does not show a difference{'; MAE is better when lower' if 'mae' in resampled else ''}."
        f"{_rests_on(left_out)}"
    )
    return [Table(header, rows, caption)] if rows else []


def _interval(low: float, high: float) -> str:
    return "-" if math.isnan(low) else f"[{low:.3f}, {high:.3f}]"


def _figures(
    config: Config,
    data: MultimodalData,
    task: Task,
    outcomes: Outcomes,
    resampled: Resampled,
    units: list[Unit],
    root: Path,
) -> list[Block]:
    values = {
        COLUMNS[key][0]: {name: [run.metrics[key] for run in runs] for name, runs in outcomes.items()}
        for key in resampled
    }
    whiskers = {
        COLUMNS[key][0]: {name: interval(r) for name, r in rows.items()} for key, rows in resampled.items()
    }
    blocks: list[Block] = [
        Figure(
            "plots/comparison.png",
            plots.comparison(values, whiskers),
            "Mean over seeds (bars), single seeds (dots), 95 % interval over test samples (whiskers).",
        )
    ]
    networks = {
        name: [r["history"] for run in runs for r in run.results]
        for name, runs in outcomes.items()
        if runs[0].trained
    }
    blocks += [
        Heading("Training"),
        Figure(
            "plots/supervised.png",
            plots.supervised_curves(networks, task.loss_title),
            "Supervised phase: each run thin, thick their mean, where a run that has stopped keeps its last value.",
        ),
    ]
    pretraining = [r for unit in units if (r := load_result(unit.folder(root) / PRETRAINING))]
    logged = pretraining[0]["history"][-1] if pretraining else {}
    if "train_mean_diagonal" in logged or "train_mean_cosine" in logged:
        blocks += [
            Figure(
                "plots/pretraining.png",
                plots.pretraining_curves([r["history"] for r in pretraining]),
                "Self-supervised phase: each run thin, thick their mean.",
            )
        ]
    if "train_mean_diagonal" in logged:
        first = units[0].config(config)
        inputs = make_splits(data, first.data, first.run.seed).inputs
        before, after = before_and_after(units[0].folder(root) / PRETRAINING / LAST, inputs)
        blocks += [
            Figure(
                "plots/correlation.png",
                plots.correlation_maps(before, after),
                f"Cross-correlation of two augmented views of one batch before and after pre-training ({units[0]}): "
                f"the first dimensions of {len(before)}, and the distribution over all cells.",
            ),
        ]
    return [*blocks, Heading("Predictions"), _predictions(task, data, outcomes, units[0].seed)]


def _predictions(task: Task, data: MultimodalData, outcomes: Outcomes, seed: int) -> Figure:
    first = {name: runs[0] for name, runs in outcomes.items()}
    if task.name == "multilabel":
        found = {
            name: {label: [run.metrics[f"f1_{label}"] for run in runs] for label in task.targets}
            for name, runs in outcomes.items()
        }
        drawn = plots.per_label(found)
        caption = "F1 of each label on the test samples: mean over seeds (bars), single seeds (dots)."
    elif task.name == "classification":
        drawn = plots.confusion(
            {name: (run.predictions.argmax(1), run.truths.astype(int)) for name, run in first.items()},
            task.targets,
        )
        caption = (
            f"Classes predicted of each true class on the test samples, seed {seed}, in percent of the true."
        )
    else:
        drawn = plots.scatter(
            {
                (name, "" if task.outputs == 1 else target): (
                    run.predictions[:, k],
                    run.truths.reshape(len(run.truths), -1)[:, k],
                )
                for name, run in first.items()
                for k, target in enumerate(task.targets)
            },
            data.label_range,
        )
        caption = (
            f"Predictions against truths on the test samples, seed {seed}; predictions are clipped to the range of "
            "labels in this figure alone."
        )
    return Figure("plots/predictions.png", drawn, caption)


def _appendix(outcomes: Outcomes, task: Task) -> list[Block]:
    keys = next(iter(outcomes.values()))[0].metrics
    means = [[key, *(_plain(key, runs) for runs in outcomes.values())] for key in keys]
    single = [
        [f"{name}, seed {run.seed}", *(shown(run.metrics[key], 3) for key in task.main)]
        for name, runs in outcomes.items()
        for run in runs
        if len(runs) > 1
    ]
    caption = "Mean ± standard deviation, as fractions." + "".join(
        f" {text}" for key, text in LEGEND.items() if key in keys
    )
    blocks: list[Block] = [Table(["", *outcomes], means, caption)]
    if single:
        blocks.append(Table(["", *task.main], single, "Single seeds; all their metrics are in results.csv."))
    return blocks


def _plain(key: str, runs: Sequence[Outcome]) -> str:
    summary = summarise(key, [run.metrics[key] for run in runs])
    mean = shown(summary.mean, 3)
    return mean if summary.n == 1 or mean == "-" else f"{mean} ± {shown(summary.std, 3)}"


def _results(outcomes: Outcomes) -> dict[str, Any]:
    return {
        name: {
            "runs": [{"seed": run.seed, "metrics": run.metrics} for run in runs],
            "best": (best := best_run(runs)) and {"seed": best.seed, "valid_loss": _valid_loss(best)},
            "summary": {
                key: asdict(summarise(key, [run.metrics[key] for run in runs])) for key in runs[0].metrics
            },
        }
        for name, runs in outcomes.items()
    }


def _csv(outcomes: Outcomes) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["row", "seed", *next(iter(outcomes.values()))[0].metrics])
    for name, runs in outcomes.items():
        rows.writerows([name, run.seed, *run.metrics.values()] for run in runs)
    return text.getvalue()
