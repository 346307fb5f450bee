"""Experiments: what they compute, that they go on where they stopped, and their report."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV
from training_help import SHARED, TINY, mmfast

from mmfast.data import MultimodalData, MultimodalDataset, save, synthetic
from mmfast.metrics import regression_metrics
from mmfast.studies.baselines import PENALTIES, constant, pooled, ridge
from mmfast.studies.report.document import Code, Figure, Heading, Table, Text, to_html, to_markdown
from mmfast.studies.report.verdict import verdict
from mmfast.studies.statistics import bootstrap, corr, interval, mae, summarise
from mmfast.training import runs
from mmfast.training.data_config import DataConfig
from mmfast.training.module import StageModule
from mmfast.training.predictions import read_predictions
from mmfast.training.splits import make_splits

QUICK = [
    "--supervised.epochs=3",
    "--pretraining.epochs=2",
    "--experiment.seeds=[0, 5]",
    "--experiment.workers=1",
]
FEATURES = {"text": 8, "audio": 6, "visual": 4}
ROWS = ["FS", "SLE", "SSL", "LE", "ridge", "constant"]


def experiment(folder: Path, *arguments) -> Path:
    assert mmfast("experiment", *TINY, *QUICK, f"--run.folder={folder}", *arguments) == 0
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return experiment(tmp_path_factory.mktemp("experiment"))


@pytest.fixture(scope="module")
def folded(tmp_path_factory) -> Path:
    """Data like ICT-MMMO: a pool without text, and complete samples to cross-validate."""
    folder = tmp_path_factory.mktemp("folded")
    data = synthetic(100, max_length=6, missing=0.0, features=FEATURES)
    pool = data.train.subset(range(40))
    lengths = {m: pool.lengths(m) * (m != "text") for m in FEATURES}
    values = {m: pool.flat(m)[: int(lengths[m].sum())] for m in FEATURES}
    pool = MultimodalDataset.from_flat(values, lengths, ids=pool.ids, names=pool.names)
    complete = data.train.subset(range(40, 65))
    save(MultimodalData(unlabelled=pool, cross_validation=complete, name="folded"), folder / "data.npz")
    experiment(
        folder / "run",
        f"--data.path={folder / 'data.npz'}",
        "--data.folds=3",
        "--experiment.methods=[FS, LE]",
    )
    return folder / "run"


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_rows_seeds_and_metrics(whole):
    table = results(whole)
    assert list(table) == ROWS
    for row in ROWS:
        seeds = [run["seed"] for run in table[row]["runs"]]
        assert seeds == ([0] if row in ("ridge", "constant") else [0, 5])
        for i, run in enumerate(table[row]["runs"]):
            folder = whole / f"seed{seeds[i]}" / row
            _, predictions, truths = read_predictions(folder / "predictions.csv")
            expected = regression_metrics(predictions, truths) if row != "constant" else None
            assert expected is None or run["metrics"] == expected
    assert table["FS"]["runs"][0]["metrics"] != table["FS"]["runs"][1]["metrics"]


def test_pretraining_is_shared_by_ssl_and_le(whole):
    for seed in (0, 5):
        made = {path.parent.name for path in (whole / f"seed{seed}").glob("*/last.ckpt")}
        assert made == {"pretraining", "FS", "SLE", "SSL", "LE"}
        for name, expected in (("FS", None), ("SLE", None), ("SSL", 49), ("LE", 49)):
            handover = json.loads((whole / f"seed{seed}" / name / "result.json").read_text())["handover"]
            assert handover.get("encoder", {}).get("tensors") == expected


def test_frozen_rows_kept_their_encoder(whole):
    def encoder(path: Path) -> list[torch.Tensor]:
        state = torch.load(path, weights_only=True)["state_dict"]
        return [tensor for name, tensor in state.items() if name.startswith("encoder.")]

    pretrained = encoder(whole / "seed0/pretraining/last.ckpt")
    assert all(map(torch.equal, encoder(whole / "seed0/LE/best.ckpt"), pretrained))
    assert not all(map(torch.equal, encoder(whole / "seed0/SSL/best.ckpt"), pretrained))
    assert not all(map(torch.equal, encoder(whole / "seed0/SLE/best.ckpt"), pretrained))


def test_a_complete_experiment_is_not_run_again(whole, monkeypatch):
    monkeypatch.setattr(runs, "fit", None)
    before, report = results(whole), (whole / "report.md").read_text()
    assert mmfast("experiment", f"--config={whole / 'config.yaml'}") == 0
    assert results(whole) == before
    (whole / "report.md").write_text(report)  # other tests read the command in it


class Died(BaseException):
    pass


def test_an_interrupted_experiment_goes_on(whole, tmp_path, monkeypatch):
    step, steps = StageModule.training_step, []

    def deadly(self, batch, batch_idx):
        steps.append(batch_idx)
        if len(steps) == 30:
            raise Died
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", deadly)
        with pytest.raises(Died):
            experiment(tmp_path)
    complete = list(tmp_path.glob("seed*/*/result.json"))
    assert complete and not (tmp_path / "report.html").exists()
    times = {path: path.stat().st_mtime_ns for path in complete}
    experiment(tmp_path)
    assert results(tmp_path) == results(whole)
    assert times == {path: path.stat().st_mtime_ns for path in complete}


def test_killed_with_its_workers_it_goes_on_with_the_same_results(whole, tmp_path):
    """Also: the number of workers does not change results."""
    arguments = ["experiment", *TINY, *QUICK, f"--run.folder={tmp_path}", "--experiment.workers=2"]
    process = subprocess.Popen([sys.executable, "-m", "mmfast", *arguments], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("seed*/FS/result.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(1.5)  # workers look after their parent twice a second
    assert not (tmp_path / "report.html").exists()
    experiment(tmp_path)
    assert results(tmp_path) == results(whole)


def test_another_experiment_in_the_folder_is_refused(whole, capsys):
    assert mmfast("experiment", *TINY, *QUICK, f"--run.folder={whole}", "--supervised.lr=0.02") == 2
    assert re.search(r"supervised\.lr = 0\.01, got 0\.02; name another folder", capsys.readouterr().err)


def test_folds_are_pooled(folded):
    table = results(folded)
    for row in ("FS", "LE", "ridge"):
        parts = [read_predictions(folded / "seed0" / f"fold{k}" / row / "predictions.csv") for k in range(3)]
        names = [name for part in parts for name in part[0]]
        assert len(names) == len(set(names)) == 25
        predictions, truths = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
        assert table[row]["runs"][0]["metrics"] == regression_metrics(predictions, truths)
    assert "25 samples in 3-fold cross-validation, 2 seeds" in (folded / "report.md").read_text()


def test_ridge_is_sklearn_on_standardised_means():
    splits = make_splits(synthetic(80, max_length=6, features=FEATURES), DataConfig(), seed=0)
    x = pooled(splits.train)
    sample = splits.train[3]
    means = [v.numpy().mean(0) if len(v) else np.zeros(v.shape[1]) for v in sample.values.values()]
    np.testing.assert_allclose(x[3], np.concatenate(means), rtol=1e-5, atol=1e-6)
    x = np.concatenate([x, pooled(splits.valid)])
    y = torch.cat([splits.train.labels, splits.valid.labels]).numpy()
    centre, scale = x.mean(0), np.where(x.std(0) > 1e-12, x.std(0), 1)
    model = RidgeCV(PENALTIES).fit((x - centre) / scale, y)
    np.testing.assert_allclose(
        ridge(splits)[:, 0], model.predict((pooled(splits.test) - centre) / scale), rtol=1e-4, atol=1e-5
    )
    assert np.array_equal(ridge(splits), ridge(splits))
    assert set(constant(splits).flatten()) == {np.median(y)}


def test_summary():
    s = summarise("mae", [1.0, 2.0, 3.0])
    assert (s.mean, s.std, s.n) == (2.0, 1.0, 3)
    # Student's t with 2 degrees of freedom: 4.302653; on the logarithm, whose slope at the mean is 1 / 2.
    reach = 4.302653 / 3**0.5 / 2
    assert (s.low, s.high) == pytest.approx((2 * np.exp(-reach), 2 * np.exp(reach)), rel=1e-6)
    z = summarise("corr", [0.1, 0.3, 0.5])
    reach = 4.302653 * 0.2 / 3**0.5 / (1 - 0.3**2)
    assert (z.low, z.high) == pytest.approx(
        tuple(np.tanh(np.arctanh(0.3) + np.array([-reach, reach]))), rel=1e-6
    )
    for few in ([0.5], [0.1, 0.3]):
        assert np.isnan([summarise("corr", few).low, summarise("corr", few).high]).all(), (
            "few runs say nothing"
        )
    assert (summarise("corr", [0.1, 0.3]).mean, summarise("corr", [0.5]).n) == (0.2, 1)


@pytest.mark.parametrize(
    ("metric", "low", "high"),
    [("corr", -1, 1), ("ccc", -1, 1), ("acc2", 0, 1), ("f1_has0", 0, 1), ("mae", 0, np.inf)],
)
def test_intervals_over_seeds_stay_in_the_range_of_their_metric(metric, low, high):
    top = min(high, 9.0)
    for values in (
        [low, top, top],
        [low, low, top],
        [top - 1e-9, top, top],
        [low + 1e-12, low, low],
        [top] * 4,
    ):
        s = summarise(metric, values)
        assert low <= s.low <= s.mean <= s.high <= high, values
    narrow = summarise(metric, [0.300, 0.301, 0.302])
    reach = 4.302653 * 0.001 / 3**0.5
    assert (narrow.low, narrow.high) == pytest.approx((0.301 - reach, 0.301 + reach), rel=1e-3), (
        "where values are close, all scales are straight"
    )


def test_mean_curves_do_not_jump_where_a_run_stops():
    from mmfast.studies.report import plots

    _, axes = plots._figure(1, 1, 3, 3)
    plots._curves(axes[0][0], [[4.0, 3.0, 2.0, 2.0], [8.0, 6.0]], "#000000", "-", "x")
    *_, mean = axes[0][0].get_lines()
    assert mean.get_ydata().tolist() == [6.0, 4.5, 4.0, 4.0]


def test_the_best_run_is_one_run_chosen_by_validation(whole):
    table = results(whole)
    text = (whole / "report.md").read_text()
    for row in ("FS", "SLE", "SSL", "LE"):
        losses = {
            seed: json.loads((whole / f"seed{seed}" / row / "result.json").read_text())["valid_loss"]
            for seed in (0, 5)
        }
        seed = min(losses, key=losses.get)
        assert table[row]["best"] == {"seed": seed, "valid_loss": losses[seed]}
        metrics = next(run["metrics"] for run in table[row]["runs"] if run["seed"] == seed)
        expected = (
            f"| {row}, seed {seed} | {losses[seed]:.3f} | {metrics['corr']:.3f} | {metrics['mae']:.3f} | "
        )
        assert expected + f"{100 * metrics['acc2']:.1f} |" in text
    assert table["ridge"]["best"] is None
    assert "(best)" not in text


def test_the_report_begins_with_what_it_is_about(whole, folded):
    lines = (whole / "report.md").read_text().splitlines()
    assert lines[0] == "# Experiment on synthetic" and lines[2].startswith("**") and lines[2].endswith(".**")
    facts = dict(re.findall(r"- \*\*(.+?)\*\*: (.+)", (whole / "report.md").read_text()))
    assert (
        facts["Data"] == "synthetic (synthetic); 57 train (28 labelled), 7 valid, 16 test; labels in [-3, 3]"
    )
    assert facts["Test"] == "16 test samples, 2 seeds"
    # 57 inputs in batches of 16, the last one dropped; 28 labels in batches of 8.
    assert facts["Pre-training"].startswith("57 samples, 6 steps in 2 epochs")
    assert facts["Training of FS"].startswith("12 steps in 3 epochs")
    assert facts["Model"].startswith("M3Encoder, 5,760 parameters, 9 in the head, 416 in the projector")
    assert re.match(time.strftime("%Y-"), facts["Written"])
    facts = dict(re.findall(r"- \*\*(.+?)\*\*: (.+)", (folded / "report.md").read_text()))
    assert facts["Command"].startswith("mmfast experiment --data.synthetic.samples=80 ")
    assert "'--data.synthetic.features={text: 8, audio: 6, visual: 4}'" in facts["Command"]
    assert "25 to cross-validate" in facts["Data"] and "40 in the unlabelled pool" in facts["Data"]


def test_the_table_on_a_terminal_fits_80_columns():
    six = ["0.123 ± 0.004"] * 6
    text = Table(["", "n", "Corr", "MAE", "Acc2", "F1", "Acc5", "Acc7"], [["constant", "10", *six]]).text()
    assert max(map(len, text.splitlines())) <= 80
    assert text.splitlines()[0].split() == ["n", "Corr", "MAE", "Acc2", "F1"]
    assert Table(["", "n"], [["FS", "1"]]).text() == "    n\nFS  1"


def test_the_verdict_fits_the_numbers():
    generator = np.random.default_rng(0)
    truths = generator.normal(size=500)

    def verdict_on(**noise: float) -> str:
        rows = {name: (truths + s * generator.normal(size=500))[None] for name, s in noise.items()}
        rows["constant"] = np.zeros((1, 500))
        metrics = {"corr": corr, "mae": mae}
        means = {
            key: {name: float(f(p, truths).mean()) for name, p in rows.items()} for key, f in metrics.items()
        }
        resampled = {
            key: {name: bootstrap(p, truths, f) for name, p in rows.items()} for key, f in metrics.items()
        }
        return verdict([name for name in noise if name != "ridge"], means, resampled)

    worse = verdict_on(FS=0.6, SSL=0.6, ridge=0.2)
    assert (
        worse.startswith("Ridge regression beats the networks (") and "pre-training shows no effect" in worse
    )
    better = verdict_on(FS=0.5, SSL=0.2, ridge=0.5)
    assert better.startswith("SSL beats ridge regression (SSL - ridge: correlation +0.")
    assert "pre-training helps (SSL - FS: " in better
    assert "pre-training harms" in verdict_on(FS=0.2, SSL=0.5, ridge=0.9)
    assert "are not told apart" in verdict_on(FS=0.3, SSL=0.3, ridge=0.3)
    assert verdict_on(FS=3.0, ridge=0.2).startswith(
        "No network is shown to be better than the median label ("
    )
    assert verdict_on(FS=0.2).startswith("FS beats the median label (")
    for sentence in (worse, better):
        assert sentence.count(".") == len(re.findall(r"\d\.\d", sentence)) + 1, "one sentence"


def test_bootstrap_covers_and_pairs():
    generator = np.random.default_rng(0)
    truths = generator.normal(size=400)
    noisy = truths + generator.normal(size=(3, 400))
    low, high = interval(bootstrap(noisy, truths, corr))
    expected = np.mean([np.corrcoef(p, truths)[0, 1] for p in noisy])
    assert low < expected < high
    # The standard error of a correlation r from n samples is about (1 - r^2) / sqrt(n).
    assert (high - low) / 2 / 1.96 == pytest.approx((1 - expected**2) / 20, rel=0.35)
    better = truths + 0.9 * (noisy - truths)
    low, high = interval(bootstrap(better, truths, mae) - bootstrap(noisy, truths, mae))
    assert low < high < 0


def test_a_correlation_with_a_constant_is_undefined_and_resamples_without_one_are_left_out():
    constant = np.full((2, 24), 0.1)  # whose mean is not exactly 0.1
    truths = np.random.default_rng(0).normal(size=24)
    assert np.isnan(corr(constant, truths)).all() and np.isnan(corr(truths, constant)).all()
    assert np.isnan(interval(bootstrap(constant, truths, corr))).all()
    # Of three samples a resample is often one sample three times.
    low, high = interval(bootstrap(np.array([[0.0, 1.0, 2.0]]), np.array([0.0, 1.0, 2.0]), corr))
    assert low == pytest.approx(1) and high == pytest.approx(1)
    assert np.isnan(summarise("corr", [0.1, np.nan]).mean)


def test_document_escapes_and_embeds():
    blocks = [
        Heading("A & B", 1),
        Text("x < y"),
        Table(["", "a|b"], [["r", "1"]], "c"),
        Code("k: v"),
        Figure("p.png", b"\x89PNG", "f"),
    ]
    page, text = to_html("t", blocks), to_markdown(blocks)
    assert "A &amp; B" in page and "x &lt; y" in page and 'src="data:image/png;base64,iVBORw' in page
    assert "http" not in page.replace("http-equiv", "")
    assert "# A & B" in text and "| a/b |" in text and "![f](p.png)" in text
    assert blocks[2].text() == "   a|b\nr    1"


def test_report_is_complete(whole):
    page, text = (whole / "report.html").read_text(), (whole / "report.md").read_text()
    plots = {path.name for path in (whole / "plots").iterdir()}
    assert plots == {
        f"{n}.png" for n in ("comparison", "correlation", "predictions", "pretraining", "supervised")
    }
    assert page.count("data:image/png;base64,") == len(plots)
    assert all(f"plots/{name}" in text for name in plots)
    for word in (
        *ROWS,
        "SSL - FS",
        "acc7_cmu",
        "supervised:",
        "torch:",
        "16 test samples, 2 seeds",
        "49 tensors (5,760 parameters) of the stage before",
    ):
        assert word in page and word in text, word
    assert not re.search(r"src=\"(?!data:)|href=", page)
    with open(whole / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == ["FS"] * 2 + ["SLE"] * 2 + ["SSL"] * 2 + ["LE"] * 2 + [
        "ridge",
        "constant",
    ]


@pytest.mark.skipif(not (SHARED / "data/ict_mmmo").exists(), reason="the ICT-MMMO files are not here")
def test_real_data_splits_and_ridge():
    from mmfast.data import load

    data = load(SHARED / "data/ict_mmmo")
    predictions, truths = [], []
    for fold in range(5):
        splits = make_splits(data, DataConfig(fold=fold), seed=0)
        assert len(splits.inputs) == 220 + len(splits.train)
        predictions.append(ridge(splits)[:, 0])
        truths.append(splits.test.labels.numpy())
    predictions, truths = np.concatenate(predictions), np.concatenate(truths)
    assert len(truths) == 120
    assert np.corrcoef(predictions, truths)[0, 1] > 0.4
    assert abs(predictions - truths).mean() < 1.2
