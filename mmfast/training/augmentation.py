"""The chains of augmentations that a configuration describes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mmfast.errors import UserError
from mmfast.training.config import AugmentationConfig
from mmfast.transforms import Chain, FeatureMask, GaussianNoise, SeqAug, TimeMask, Transform, TwoViews

# name -> (transform, its arguments, p in the first view, p in the second): thesis table 8.2.1.
STEPS = {
    "noise": (GaussianNoise, {"mu": 0.0, "sigma": 0.1}, 0.9, 0.1),
    "masking": (TimeMask, {"q": 0.7}, 0.6, 0.6),
    "feature_masking": (FeatureMask, {"q": 0.7}, 0.6, 0.6),
    "seqaug": (SeqAug, {"alpha": {"text": 0.15, "audio": 0.10, "visual": 0.20}}, 0.5, 0.5),
}


def make_views(config: AugmentationConfig, modalities: tuple[str, ...]) -> TwoViews:
    """The two chains, from their steps or the preset.

    Raises:
        UserError: an unknown name of a step, an argument that its transform does not take, or a value out of range.
    """
    chains = []
    for number, (view, steps) in enumerate((("view_a", config.view_a), ("view_b", config.view_b))):
        if steps is None:
            steps = [_preset_step(name, number, modalities) for name in config.preset.split("+")]
        where = f"augmentation.{view}"
        chains.append(Chain([_step(step, where, config.apply, modalities) for step in steps]))
    return TwoViews(*chains)


def _preset_step(name: str, view: int, modalities: tuple[str, ...]) -> dict[str, Any]:
    _, arguments, *p = _known(name, "augmentation.preset")
    arguments = dict(arguments)
    if "alpha" in arguments:
        missing = [m for m in modalities if m not in arguments["alpha"]]
        if missing:
            raise UserError(
                f"augmentation.preset: seqaug has no alpha for the modality {missing[0]!r}; "
                "give the steps by view_a and view_b"
            )
        arguments["alpha"] = {m: arguments["alpha"][m] for m in modalities}
    return {"name": name, "p": p[view], **arguments}


def _step(step: Mapping[str, Any], where: str, apply: str, modalities: tuple[str, ...]) -> Transform:
    if "name" not in step:
        raise UserError(f"{where}: each step needs a name, got {dict(step)}")
    arguments = {key: value for key, value in step.items() if key != "name"}
    transform = _known(step["name"], where)[0]
    accepted = inspect.signature(transform).parameters
    for key in arguments:
        if key not in accepted:
            raise UserError(f"{where}: {step['name']} has no {key!r}, it takes {', '.join(accepted)}")
    try:
        made = transform(**{"apply": apply, **arguments})
        for modality in modalities:
            made.step(modality)  # refuses a modality that it has no number for
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error
    return made


def _known(name: str, where: str) -> tuple:
    if not isinstance(name, str) or name not in STEPS:
        raise UserError(f"{where}: a step must be one of {', '.join(STEPS)}, got {name!r}")
    return STEPS[name]
