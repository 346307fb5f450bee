"""Rows of an experiment from YAML files of stages."""

from __future__ import annotations

import json

import pytest
import torch
from training_help import TINY, mmfast

METHOD = """
model: {hidden: 6}
supervised: {epochs: 2}
data: {path: nowhere}
stages:
  - {name: pretraining, objectives: {many_views: 1}, epochs: 1}
  - {name: tune, objectives: {supervised: 1, two_views: 0.1}}
"""


def test_methods_from_files_stand_beside_those_of_the_table(tmp_path):
    file = tmp_path / "views.yaml"
    file.write_text(METHOD)
    folder = tmp_path / "e"
    arguments = [*TINY, f"--run.folder={folder}", "--experiment.seeds=[0]", "--experiment.workers=1"]
    arguments += ["--supervised.epochs=1", "--pretraining.epochs=1", f"--experiment.methods=[SSL, {file}]"]
    assert mmfast("experiment", *arguments) == 0
    made = {path.parent.name for path in folder.glob("seed0/*/last.ckpt")}
    # Its first stage bears the name of the table's, and is another.
    assert made == {"pretraining", "views-pretraining", "SSL", "views"}
    result = json.loads((folder / "seed0/views/result.json").read_text())
    assert result["epochs"] == 2 and "train_two_views" in result["history"][0]
    weights = torch.load(folder / "seed0/views/best.ckpt", weights_only=True)["mmfast"]["config"]["model"]
    assert weights["hidden"] == 6
    report = (folder / "report.md").read_text()
    assert f"views: pretraining, then tune ({file})" in report
    file.write_text(METHOD.replace("hidden: 6", "hidden: 7"))
    assert mmfast("experiment", *arguments) == 2


@pytest.mark.parametrize(
    "content, methods, sentence",
    [
        (METHOD, "[FS, {file}, other/m.yaml]", "must have each name once, got 'm' again by 'other/m.yaml'"),
        (
            METHOD.replace("many_views", "many"),
            "[{file}]",
            "stages[0] pretraining: an objective must be one of",
        ),
        (METHOD.replace("hidden: 6", "hiden: 6"), "[{file}]", "m.yaml: there is no setting model.hiden"),
        ("stages: [{name: a, objectives: {two_views: 1}}]", "[{file}]", "last stage must have labels"),
        (METHOD, "[nowhere.yaml]", "method nowhere.yaml: No such file"),
    ],
)
def test_a_wrong_method_is_refused_before_anything_is_run(content, methods, sentence, tmp_path, capsys):
    file = tmp_path / "m.yaml"
    file.write_text(content)
    arguments = [*TINY, f"--run.folder={tmp_path / 'e'}", f"--experiment.methods={methods.format(file=file)}"]
    assert mmfast("experiment", *arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1, error
    assert not (tmp_path / "e").exists()
