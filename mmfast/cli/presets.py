"""Named settings to start from, by ``--preset``.

Each name stands for a line of help and the settings that differ from the defaults.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Preset(NamedTuple):
    help: str
    settings: dict[str, Any]


# For hundreds of samples instead of ten thousands: at the thesis' sizes an epoch is one or two steps, so that both
# pre-training and a linear head would still be on their way when the epochs end. 300 inputs make 160 steps here.
SMALL: dict[str, Any] = {
    "pretraining": {"batch_size": 64, "epochs": 40},
    "supervised": {"linear_lr": 1e-2},
}

# Poulinakis 2023 as printed. The defaults are what its code ran (learning rate 1e-3), lambda as Barlow Twins has it,
# and means over time.
THESIS: dict[str, Any] = {
    "model": {"pooling": "sum"},
    "loss": {"lambd": 2e-2},
    "pretraining": {"lr": 3e-6},
    "experiment": {"seeds": [0, 1, 2, 3, 4]},
}

# Small enough for a minute or two on two cores: every part at work, none at full size.
DEMO: dict[str, Any] = {
    "data": {"synthetic": {"samples": 2000, "labelled": 0.25, "max_length": 20}},
    "model": {"hidden": 32, "projector": [128, 128, 128]},
    "pretraining": {"epochs": 20, "batch_size": 128},
    "supervised": {"lr": 1e-3, "linear_lr": 1e-2, "epochs": 30, "patience": 8},
    "run": {"folder": "runs/demo"},
    "experiment": {"seeds": [0, 1]},
}

PRESETS = {
    "demo": Preset("a small model on synthetic data, in minutes", DEMO),
    "small": Preset("for hundreds of samples: more steps of pre-training, a faster head", SMALL),
    "thesis": Preset(
        "the settings as the thesis prints them, where its code and our defaults differ", THESIS
    ),
}
