"""Named settings to start from, by ``--preset``."""

from __future__ import annotations

from typing import Any

# For hundreds of samples instead of ten thousands: with few steps per epoch a linear head at the thesis' learning
# rate would still be on its way when the epochs end.
SMALL: dict[str, Any] = {"supervised": {"linear_lr": 1e-2}}

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
