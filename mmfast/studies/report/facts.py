"""What a reader of a report must know of an experiment: samples, labels, sizes, steps, command, date."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mmfast.data import MultimodalData, MultimodalDataset
from mmfast.data.folds import described
from mmfast.studies.experiment import Outcome, Unit
from mmfast.training.components import make_module
from mmfast.training.config import Config
from mmfast.training.data_config import place
from mmfast.training.folder import load_result
from mmfast.training.stages import PRETRAINING, pretraining_stage, supervised_stage
from mmfast.training.task import task_of_data


def facts(
    config: Config,
    data: MultimodalData,
    units: Sequence[Unit],
    outcomes: Mapping[str, Sequence[Outcome]],
    command: str,
) -> list[tuple[str, str]]:
    """Names and texts, in the order of a report."""
    root = Path(config.run.folder)
    results = {name: [r for run in runs for r in run.results] for name, runs in outcomes.items()}
    pretraining = [r for unit in units if (r := load_result(unit.folder(root) / PRETRAINING))]
    supervised = [r for name, runs in outcomes.items() if runs[0].trained for r in results[name]]
    everything = [*pretraining, *(r for rs in results.values() for r in rs)]
    rows = [
        ("Data", f"{data.name} ({place(config.data)}); {_parts(data)}; {_targets(data)}"),
        ("Task", task_of_data(config.task, data).describe()),
        ("Test", _test(config, data, units, len(next(iter(outcomes.values()))[0].truths))),
    ]
    if supervised:
        train, valid = (_span(r["samples"][name] for r in supervised) for name in ("train", "valid"))
        rows.append(("Labels used", f"{train} to train, {valid} to validate, in each run"))
    if pretraining:
        inputs = _span(r["samples"]["inputs"] for r in pretraining)
        rows.append(("Pre-training", f"{inputs} samples, {_steps(pretraining)}; its last weights"))
    rows += [
        (f"Training of {name}", f"{_steps(results[name])}; the epoch of lowest validation loss is tested")
        for name, runs in outcomes.items()
        if runs[0].trained
    ]
    rows.append(("Model", _model(config, data, bool(pretraining))))
    takers = [name for name, rs in results.items() if any(r.get("handover") for r in rs)]
    handed = {
        f"{taken['tensors']} tensors ({taken['parameters']:,} parameters)"
        for r in supervised
        for taken in r.get("handover", {}).values()
    }
    if handed:
        rows.append(
            (
                "Taken over",
                f"{' or '.join(sorted(handed))} of the stage before by every run of {', '.join(takers)}",
            )
        )
    return [
        *rows,
        (
            "Inputs",
            "standardised on what pre-training may see, never on validation or test samples; baselines are "
            "fitted on training and validation samples",
        ),
        ("Command", command),
        (
            "Written",
            f"{time.strftime('%Y-%m-%d %H:%M')}, after {sum(r['seconds'] for r in everything):.0f} s of work",
        ),
    ]


def _targets(data: MultimodalData) -> str:
    if data.label_range is not None:
        return "labels in [{:g}, {:g}]".format(*data.label_range)
    return f"{'classes' if data.task == 'classification' else 'labels'}: {', '.join(data.targets)}"


def _parts(data: MultimodalData) -> str:
    names = ("train", "valid", "test", "unlabelled", "cross_validation")
    titles = {"cross_validation": "to cross-validate", "unlabelled": "in the unlabelled pool"}
    parts: dict[str, MultimodalDataset] = {name: getattr(data, name) for name in names}
    return ", ".join(
        f"{len(part)} {titles.get(name, name)}{_labelled(part)}"
        for name, part in parts.items()
        if part is not None and len(part)
    )


def _labelled(part: MultimodalDataset) -> str:
    labelled = int(part.labelled().sum())
    return "" if labelled == len(part) else f" ({labelled or 'none'} labelled)"


def _test(config: Config, data: MultimodalData, units: Sequence[Unit], samples: int) -> str:
    seeds = len({unit.seed for unit in units})
    many = f"{seeds} seed{'s' * (seeds > 1)}"
    if units[0].fold is None:
        return f"{samples} test samples, {many}"
    folds = f"{config.data.folds}-fold cross-validation"
    if data.protocol is not None:
        folds = described(data.cross_validation, data.protocol)
    return (
        f"{samples} samples in {folds}, {many}; metrics are of one seed at a time, "
        "on the pooled predictions for the folds that a run did not train on; all seeds and rows have the same folds"
    )


def _steps(results: Iterable[Mapping[str, Any]]) -> str:
    results = list(results)
    epochs = f"{_span(r['epochs'] for r in results)} epochs"
    steps = [r["steps"] for r in results if "steps" in r]
    return f"{_span(steps)} steps in {epochs}" if steps else epochs


def _span(numbers: Iterable[int]) -> str:
    low, high = min(numbers := list(numbers)), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _model(config: Config, data: MultimodalData, pretrained: bool) -> str:
    features = data.features
    task = task_of_data(config.task, data)
    network = make_module(config, features, supervised_stage(config), task=task)
    text = (
        f"{config.model.encoder}, {_size(network.encoder):,} parameters, {_size(network.head):,} in the head"
    )
    if pretrained:
        network = make_module(config, features, pretraining_stage(config))
        text += f", {_size(network.projector):,} in the projector"
    inputs = ", ".join(f"{modality} {size}" for modality, size in features.items())
    return f"{text}; features of {inputs}"


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
