"""Named settings to start from, by ``--preset``."""

from __future__ import annotations

from typing import Any

# For hundreds of samples instead of ten thousands: at the thesis' sizes an epoch is one or two steps, so that both
# pre-training and a linear head would still be on their way when the epochs end. 300 inputs make 160 steps here.
SMALL: dict[str, Any] = {
    "pretraining": {"batch_size": 64, "epochs": 40},
    "supervised": {"linear_lr": 1e-2},
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

PRESETS = {"demo": DEMO, "small": SMALL}
