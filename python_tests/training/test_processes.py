"""Several processes of one run: what they know together, and that they come to what one process comes to."""

import pytest
import torch
from ranks import Ranks
from stage_runs import SETTINGS, run
from stage_runs import together as together_run
from training_help import assert_same, checkpoint

from mmfast.errors import UserError
from mmfast.training import processes, runs
from mmfast.training.config import Config
from mmfast.training.stages import supervised_stage


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def test_alone_a_process_is_the_main_one_and_sums_are_what_they_were():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert (processes.rank(), processes.world_size(), processes.is_main()) == (0, 1, True)
    for same in (processes.total(x), processes.rows(x)):
        assert torch.equal(same, x) and not same.requires_grad
    assert processes.agreed(lambda: "x") == "x"


def together(_):
    rank = processes.rank()
    own = torch.arange(3.0, requires_grad=True) + 10 * rank
    before = own.clone()
    sums = processes.total(own)
    rows = processes.rows(torch.full((2 * rank, 3), float(rank), dtype=torch.float64))
    asked = []
    answer = processes.agreed(lambda: asked.append(1) or {"of": processes.rank()})
    assert torch.equal(own, before) and not sums.requires_grad
    return rank, processes.world_size(), processes.is_main(), sums, rows, len(asked), answer


def test_processes_add_up_collect_rows_and_hear_what_the_first_one_says(ranks):
    for rank, got in enumerate(ranks(together)):
        assert got[:3] == (rank, 2, rank == 0)
        assert got[3].tolist() == [10, 12, 14]
        assert got[4].dtype == torch.float64 and got[4].tolist() == [[1, 1, 1]] * 2
        assert got[5:] == (1 if rank == 0 else 0, {"of": 0})


POOLED = {"model": {"encoder": "stage_runs.Pooled", "hidden": 8, "projector": [16, 16]}}
EMOTIONS = {"data": {"synthetic": {**SETTINGS["data"]["synthetic"], "task": "multilabel"}}}
CLASSES = {"data": {"synthetic": {**SETTINGS["data"]["synthetic"], "task": "classification"}}}
# objectives, settings of the stage, sections of the configuration, precision
STAGES = {
    "two views": ({"two_views": 1.0}, {"ema": 0.9}, None, "64-true"),
    "a learnt scale": ({"two_views": 1.0}, {"clip": 1.0}, {"loss": {"name": "siglip"}}, "64-true"),
    "views by classes": (
        {"two_views": 1.0},
        {"batch_size": 9},
        {**CLASSES, "loss": {"name": "sup_con"}},
        "64-true",
    ),
    "many views": ({"many_views": 1.0}, {}, None, "64-true"),
    "a last step of one sample": ({"supervised": 1.0}, {}, None, "64-true"),
    "weighted labels": (
        {"supervised": 1.0},
        {},
        {**EMOTIONS, "task": {"positive_weights": "balanced"}},
        "64-true",
    ),
    "an encoder that thaws": ({"supervised": 1.0}, {"frozen": {"encoder": 2}, "clip": 0.1}, None, "64-true"),
    # Encoded once, before the network is one of doubles.
    "a frozen encoder": ({"supervised": 1.0}, {"frozen": {"encoder": True}}, None, "32-true"),
    "terms of an encoder, which skips modalities": (
        {"supervised": 1.0, "auxiliary": 0.3},
        {"batch_size": 6, "weight_decay": 0.1},
        POOLED,
        "64-true",
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_several_processes_train_as_one_with_the_whole_batch(name, ranks, tmp_path):
    objectives, settings, sections, precision = STAGES[name]
    arguments = (objectives, settings, sections, None, precision)
    alone = run(tmp_path / "alone", *arguments)
    several = ranks(together_run, tmp_path / "several", *arguments)
    # Batches and labels are float32; what is added up in another order differs beyond that.
    close = {"rtol": 1e-5, "atol": 1e-6 if precision == "64-true" else 1e-5}
    assert len(alone.losses) == alone.result["steps"]
    for losses, _ in several:
        torch.testing.assert_close(losses, alone.losses, **close)
    history = [outcome.result["history"] for outcome in (alone, *several)]
    assert history[1] == history[2]
    for one, other in zip(history[0], history[1], strict=True):
        torch.testing.assert_close(other, one, **close)
    for file in sorted(path.name for path in (tmp_path / "alone").glob("*.ckpt")):
        one, other = (checkpoint(tmp_path / where / file) for where in ("alone", "several"))
        torch.testing.assert_close(other["state_dict"], one["state_dict"], **close)
    assert several[0].result["metrics"] if "supervised" in objectives else True
    files = [sorted(p.name for p in (tmp_path / where).iterdir()) for where in ("alone", "several")]
    assert files[0] == files[1]


@pytest.mark.parametrize("objective", ["two_views", "supervised"])
def test_a_resumed_run_of_several_processes_is_the_one_that_was_not_stopped(objective, ranks, tmp_path):
    arguments = ({objective: 1.0}, {}, None, None, "32-true")
    whole = ranks(together_run, tmp_path / "whole", *arguments)
    assert ranks(together_run, tmp_path / "stopped", *arguments, 8) == [None, None]
    resumed = ranks(together_run, tmp_path / "stopped", *arguments)
    assert len(resumed[0].losses) < len(whole[0].losses)
    assert [r.result["history"] for r in resumed] == [w.result["history"] for w in whole]
    one, other = (checkpoint(tmp_path / where / "last.ckpt") for where in ("whole", "stopped"))
    for key in ("state_dict", "optimizer_states", "epoch", "global_step"):
        assert_same(one[key], other[key], key)


def test_processes_draw_for_themselves_with_dropout(ranks, tmp_path):
    model = {"model": {**SETTINGS["model"], "dropout": 0.5}}
    two = ranks(together_run, tmp_path / "two", {"two_views": 1.0}, {}, model, None, "32-true")
    assert two[0].losses == two[1].losses
    seeds = ranks(seeds_of_a_step, tmp_path / "seeds", model)
    assert seeds[0] != seeds[1]


def seeds_of_a_step(group, folder, model):
    seeds, seed = [], torch.manual_seed
    torch.manual_seed = lambda value: seeds.append(value) or seed(value)
    try:
        together_run(group, folder, {"two_views": 1.0}, {"epochs": 1}, model, None, "32-true")
    finally:
        torch.manual_seed = seed
    return seeds[-1]


def test_what_cannot_be_shared_is_refused(ranks, tmp_path):
    message = "supervised.batch_size must be at least the 2 processes that share it, got 1"
    for said in ranks(refused, tmp_path / "run", {"supervised": 1.0}, {"batch_size": 1}):
        assert message in said
    assert not (tmp_path / "run").exists()


def test_fewer_samples_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr(runs, "world_size", lambda: 3)
    stage = supervised_stage(Config())
    runs.check_shared(stage, 3)
    message = "supervised: there must be at least one training sample for each of 3 processes, got 2"
    with pytest.raises(UserError, match=message):
        runs.check_shared(stage, 2)


def refused(group, *arguments):
    with pytest.raises(UserError) as error:
        together_run(group, *arguments)
    return str(error.value)
