"""Experiments whose folds leave a speaker out."""

import json

import numpy as np
from training_help import TINY, mmfast

from mmfast.data import MultimodalData, MultimodalDataset, save


def test_an_experiment_runs_all_folds_of_a_protocol_and_says_what_its_numbers_rest_on(tmp_path):
    speakers = [f"Ses0{s}{who}" for s in (1, 2) for who in "FM"]
    rows = [(speaker, i) for speaker in speakers for i in range(8)]
    random = np.random.default_rng(0)
    data = MultimodalDataset(
        {"audio": [random.normal(size=(4, 3)) + i % 2 for _, i in rows]},
        [["calm", "loud"][i % 2] for _, i in rows],
        names=[f"{speaker}_{i}" for speaker, i in rows],
        groups={"speaker": [s for s, _ in rows], "session": [s[4] for s, _ in rows]},
    )
    save(MultimodalData(data, name="dialogues"), tmp_path / "data.npz")
    arguments = [
        *TINY,
        f"--data.path={tmp_path / 'data.npz'}",
        "--data.split=speaker",
        f"--run.folder={tmp_path / 'run'}",
        "--supervised.epochs=2",
        "--supervised.batch_size=8",
        "--experiment.methods=[FS]",
        "--experiment.seeds=[0, 1]",
        "--experiment.workers=1",
    ]
    assert mmfast("experiment", *arguments) == 0
    folders = sorted(p.name for p in (tmp_path / "run/seed0").iterdir() if p.is_dir())
    assert folders == ["fold0", "fold1", "fold2", "fold3"]
    tested = [(tmp_path / f"run/seed0/fold{i}/FS/predictions.csv").read_text() for i in range(4)]
    assert all(speaker in text for speaker, text in zip(speakers, tested, strict=True))
    report = " ".join((tmp_path / "run/report.md").read_text().split())
    assert "32 samples in 4 folds, leave one speaker out, the others of its session validate" in report
    assert "folds of one session have the same training samples" in report
    assert (
        "Folds share training samples, so they are not independent, and no interval is made of them" in report
    )
    assert "intervals over samples hold for these speakers and networks" in report
    results = [
        [
            json.loads((tmp_path / f"run/seed{seed}/fold{i}/FS/result.json").read_text())["metrics"]["ua"]
            for i in range(4)
        ]
        for seed in (0, 1)
    ]
    means = np.mean(results, axis=0)
    cell = f"{100 * means.mean():.1f} ± {100 * means.std(ddof=1):.1f}"
    assert f"| FS | 4 | {cell} |" in report
