"""What the benchmarks stand on: peers that compute what they say, the memory probe, the finals, the report."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from barlow_twins_formulas import FORMULAS, gradients, relative_error, views

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import memory
import peers
import races
import report

PEERS = {f"{name}, transcribed": (name, loss) for name, loss in peers.TRANSCRIBED.items()}
PEERS |= {name: (peer.variant, peer.loss) for name, peer in peers.eager_peers().items()}


@pytest.mark.parametrize("name", PEERS)
def test_peers_equal_their_formulas(name):
    """Embeddings are small, so that each place and size of eps counts."""
    variant, loss = PEERS[name]
    z = [1e-3 * view for view in views(24, 40)]
    truth = gradients(FORMULAS[variant], *z)
    value, *grads = gradients(loss, *z, dtype=torch.float32)
    assert float(value) == pytest.approx(float(truth[0]), rel=1e-5)
    assert all(relative_error(x, y) < 3e-5 for x, y in zip(grads, truth[1:], strict=True))


can_measure = pytest.mark.skipif(
    not memory.can_measure(), reason="/proc/self/clear_refs cannot be written here"
)


@can_measure
def test_peak_of_known_allocations():
    size = 2**26

    def one_after_the_other():
        for _ in range(3):
            torch.ones(size // 4)

    def together():
        return [torch.ones(size // 4) for _ in range(3)]

    one_after_the_other()
    assert memory.peak_of(one_after_the_other) == pytest.approx(size, rel=0.1)
    assert memory.peak_of(together) == pytest.approx(3 * size, rel=0.1)
    assert memory.peak_of(lambda: None) < size / 10


@can_measure
def test_peak_of_the_loss():
    """At 128 x 8192 standardised views and gradients take 16 MiB; lightly keeps matrices of 256 MiB."""
    peak = {name: memory.in_own_process(name, [(128, 8192)], threads=2)[0] for name in ("mmfast", "lightly")}
    # The system counts resident pages in batches: a little may be missing.
    assert 15 * 2**20 <= peak["mmfast"] < 24 * 2**20
    assert peak["lightly"] > 20 * peak["mmfast"]


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"memory of nobody: .*KeyError"):
        memory.in_own_process("nobody", [(4, 4)], threads=1)


def sleeper(milliseconds):
    return lambda: time.sleep(milliseconds / 1e3)


def test_the_fastest_reach_the_final(monkeypatch):
    monkeypatch.setattr(races, "BUDGET", 0.1)
    seen = []

    def too_large():
        raise RuntimeError("not enough memory: you tried to allocate 4 TB")

    others = {"d": sleeper(12), "a": sleeper(2), "c": sleeper(6), "b": sleeper(4), "yard": sleeper(20)}
    result = races.race(sleeper(1), {**others, "large": too_large}, always=["yard"], done=seen.append)
    assert set(result.times) == {"mmfast", "yard", "a", "b", "c"}
    assert set(result.qualifying) == {"mmfast", *others} == set(seen)
    assert result.skipped == {"large": "not run: out of memory"}
    assert {len(values) for values in result.times.values()} == {races.ROUNDS[0]}
    medians = result.medians()
    assert medians["mmfast"] < medians["a"] < medians["b"] < medians["c"] < medians["yard"]


def test_long_races_have_fewer_contenders(monkeypatch):
    monkeypatch.setattr(races, "QUALIFYING", 0.03)
    monkeypatch.setattr(races, "FINAL", 0.09)
    monkeypatch.setattr(races, "CHEAP", 0.0)
    monkeypatch.setattr(races, "BUDGET", 0.1)
    result = races.race(sleeper(1), {name: sleeper(20) for name in "abcd"})
    assert result.skipped == {name: "not run: the time to qualify was spent" for name in "cd"}
    assert set(result.qualifying) == {"mmfast", "a", "b"}
    assert len(result.times) == 2


def test_other_errors_of_contenders_are_raised():
    def broken():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        races.race(sleeper(1), {"broken": broken})


def test_memory_limit():
    """What does not fit fails instead of calling the out-of-memory killer; nothing is touched here."""
    free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
    nbytes = int(0.95 * 1024 * int(free.split()[1]))
    with races.memory_limit(), pytest.raises(RuntimeError, match="memory"):
        torch.empty(nbytes, dtype=torch.uint8)
    torch.empty(nbytes, dtype=torch.uint8)


def a_race(rows, columns, ours, best, dtype="float32", yardsticks=()):
    medians = {"mmfast": ours, "lightly": best, "vissl": 2 * best, **dict.fromkeys(yardsticks, 3 * ours)}
    return {
        "kind": "race",
        "op": "barlow_twins",
        "rows": rows,
        "columns": columns,
        "dtype": dtype,
        "medians": medians,
        "quartiles": {name: [0.9 * x, x, 1.1 * x] for name, x in medians.items()},
        "rounds": 7,
        "qualifying": {**medians, "monai": 0.5},
        "skipped": {"solo": "not run: out of memory"} if columns == 256 else {},
        "yardsticks": list(yardsticks),
        "best": "lightly",
        "speedup": {name: x / ours for name, x in medians.items() if name != "mmfast"},
        "share_of_floor": 0.25,
        "errors": {"mmfast": [1e-7, 2e-7, 3e-7], "lightly": [1e-3, 2e-3, 4e-3], "vissl": [1e-3]},
        "peers": {name: {"variant": name, "source": "transcribed"} for name in ("lightly", "vissl")},
    }


STEP = {
    "kind": "step",
    "configuration": "default model",
    "rows": 170,
    "columns": 1000,
    "medians": {"step, mmfast": 0.5, "step, lightly": 0.51, "loss, mmfast": 0.001, "loss, lightly": 0.011},
    "share_of_loss": {"mmfast": 0.002, "lightly": 0.0216},
    "share_of_views": 0.003,
    "ratio": 1.02,
}


@pytest.fixture
def results(tmp_path):
    infos = {
        "won": a_race(16, 64, 1e-3, 0.0123),
        "lost": a_race(64, 256, 0.010, 0.008),
        "named": a_race(170, 1000, 0.001, 0.009),
        "half": a_race(170, 1000, 0.0005, 0.009, "bfloat16", ["mmfast fp32"]),
        "ours": {"kind": "memory", "contender": "mmfast", "peaks": {"128x8192": 2**24}},
        "lightly": {"kind": "memory", "contender": "lightly", "peaks": {"128x8192": 2**30}},
        "step": STEP,
        "views[masking]": {**a_race(1, 1, 0.002, 0.003), "best": "lightly"},
        "plain": {},
    }
    del infos["views[masking]"]["op"]
    run = {
        "datetime": "2026-01-02T03:04:05",
        "machine_info": {"mmfast": {"cpu": "A Processor", "cores": 2, "torch": "2.13.0"}, "python_version": "3.11.7"},
        "commit_info": {"id": "0123456789abcdef"},
        "benchmarks": [{"name": name, "extra_info": info} for name, info in infos.items()],
    }  # fmt: skip
    path = tmp_path / "results.json"
    path.write_text(json.dumps(run))
    return path


def section(text, title):
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_report(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new/out"
    assert report.main([str(results), str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.md'}\n"
    text = (folder / "report.md").read_text()

    lost = section(text, "Where mmfast is slower than the best peer")
    assert "- 64 x 256: 0.80x, lightly takes 8.00 ms, mmfast 10.0 ms" in lost
    assert lost.count("\n- ") == 1
    grid = section(text, "Grid")
    assert "| 16 | 12.3x lightly | - |" in grid and "| 64 | - | 0.80x lightly |" in grid
    assert "170 x 1000" not in grid
    assert "| 170 x 1000 | 1.00 | 0.90 to 1.10 | lightly 9.00 | 9.00x | 25 % | 7 | vissl 18.0 |" in section(
        text, "Named shapes"
    )
    assert "| 170 x 1000 | mmfast fp32 | 1.50 | 3.00x |" in section(text, "bf16")
    assert "| lightly | 1,024 (64x) |" in section(text, "Memory")
    step = "| default model | 170 x 1000 | 500 | 510 | 1.02x | 0.2 % | 2.2 % | 0.3 % |"
    assert step in section(text, "Share of a pre-training step")
    assert "| views[masking] | 2.00 | 25 % |" in section(text, "Augmentation")
    assert "- 64 x 256: solo not run: out of memory" in section(text, "Qualifying")
    machine = section(text, "Machine")
    assert all(word in machine for word in ("2026-01-02", "A Processor, 2 cores", "2.13.0", "0123456789ab"))
    for name in ("speedup.png", "floor.png", "memory.png"):
        assert f"![]({name})" in text
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_report_without_losses(results, tmp_path):
    pytest.importorskip("matplotlib")
    run = json.loads(results.read_text())
    run["benchmarks"] = run["benchmarks"][:1]
    results.write_text(json.dumps(run))
    assert report.main([str(results), str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/report.md").read_text()
    assert "None of the 1 races." in text
    assert "memory.png" not in text and not (tmp_path / "out/memory.png").exists()


BAD = {
    "no file": (None, "cannot be read: No such file or directory"),
    "not JSON": ("{", "is not JSON: "),
    "another JSON": ("[1]", "is not the JSON of pytest-benchmark"),
    "no races": ('{"benchmarks": [{"extra_info": {}}]}', "has no races of the Barlow Twins loss"),
}


@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD)
def test_bad_results(content, message, tmp_path, capsys):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    assert report.main([str(path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"report: {path} {message}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_wrong_arguments(tmp_path, capsys):
    assert report.main([]) == 2
    assert (
        capsys.readouterr().err
        == "report: a results file and a folder for the report are wanted: results.json out/\n"
    )
    file = tmp_path / "file"
    file.write_text("")
    assert report.main([str(file), str(file)]) == 2
