"""What the command line says of wrong flags and files: the thing, its rule, the value, and no Python."""

from __future__ import annotations

import re

import pytest
from training_help import mmfast

from mmfast.cli.arguments import SPLITS, pretrain
from mmfast.cli.main import COMMANDS

# A line, and the sentence without "mmfast: " in front and the hint at help behind.
LINES = {
    # misspelt
    "pretrain --pretraning.lr 3": "pretrain: there is no --pretraning.lr; did you mean --pretraining.lr?",
    "pretrain --lr=3": "pretrain: there is no --lr; did you mean --pretraining.lr or --supervised.lr?",
    "pretrain --pretraining.batch-size 3": (
        "pretrain: there is no --pretraining.batch-size; did you mean --pretraining.batch_size?"
    ),
    "pretrain --pretraining.l 3": "pretrain: there is no --pretraining.l; did you mean --pretraining.lr?",
    "pretrain --zebra": "pretrain: there is no --zebra",
    "pretrain --experiment.seeds [1]": "pretrain: there is no --experiment.seeds",
    "pretrain -x": "pretrain: there is no -x",
    "finetune --freze true": "finetune: there is no --freze; did you mean --freeze?",
    "experiment --seeds [1]": "experiment: there is no --seeds; did you mean --experiment.seeds?",
    "evaluate a --spilt test": "evaluate: there is no --spilt; did you mean --split?",
    "evaluate a --spl test": "evaluate: there is no --spl; did you mean --split?",
    "predict a --ouput=x": "predict: there is no --ouput; did you mean --out?",
    "info --json": "info: there is no --json",
    "--verison": "there is no --verison; did you mean --version?",
    # too much, too little
    "pretrain extra": "pretrain: 'extra' is too much: settings are given as --name value",
    "experiment --experiment.seeds [0] 1": (
        "experiment: '1' is too much: --experiment.seeds takes one value, a list of whole numbers such as [1, 2]"
    ),
    "evaluate a b": "evaluate: 'b' is too much",
    "info x": "info: 'x' is too much",
    "pretrain --resume=3": "pretrain: --resume takes no value, got '3'",
    "pretrain --run.seed": "pretrain: --run.seed needs a value",
    "pretrain --run.seed --resume": "pretrain: --run.seed needs a value",
    "pretrain --config": "pretrain: --config needs a value",
    "pretrain --preset": "pretrain: --preset needs a value",
    "finetune --from": "finetune: --from needs a value",
    "evaluate a --split": "evaluate: --split needs a value",
    "evaluate": "evaluate: the following arguments are required: checkpoint",
    # types
    "pretrain --run.seed many": "pretrain: --run.seed must be a whole number, got 'many'",
    "pretrain --run.seed=": "pretrain: --run.seed must be a whole number, got ''",
    "pretrain --run.seed null": "pretrain: --run.seed must be a whole number, got 'null'",
    "pretrain --pretraining.epochs 2.5": "pretrain: --pretraining.epochs must be a whole number, got '2.5'",
    "pretrain --pretraining.epochs true": "pretrain: --pretraining.epochs must be a whole number, got 'true'",
    "pretrain --pretraining.lr fast": "pretrain: --pretraining.lr must be a number, got 'fast'",
    "pretrain --pretraining.lr null": "pretrain: --pretraining.lr must be a number, got 'null'",
    "pretrain --run.threads x": "pretrain: --run.threads must be a whole number, or null, got 'x'",
    "pretrain --model.attention maybe": "pretrain: --model.attention must be true or false, got 'maybe'",
    "pretrain --model.bidirectional 2": "pretrain: --model.bidirectional must be true, false or fusion, got '2'",
    "pretrain --model.pooling men": (
        "pretrain: --model.pooling must be one of mean, sum, last, got 'men'; did you mean mean?"
    ),
    "pretrain --preset dmo": (
        "pretrain: --preset must be one of demo, small, thesis, got 'dmo'; did you mean demo?"
    ),
    "evaluate a --split tset": (
        f"evaluate: --split must be one of {', '.join(SPLITS)}, got 'tset'; did you mean test?"
    ),
    "pretrian": (f"command must be one of {', '.join(COMMANDS)}, got 'pretrian'; did you mean pretrain?"),
    "pretrain --model.projector 5": (
        "pretrain: --model.projector must be a list of whole numbers such as [1, 2], got '5'"
    ),
    "pretrain --model.projector [1,a]": (
        "pretrain: --model.projector must be a list of whole numbers such as [1, 2], got '[1,a]'"
    ),
    "pretrain --model.projector+ a": "pretrain: --model.projector+ must be a whole number, got 'a'",
    "pretrain --data.synthetic.features {text:": (
        "pretrain: --data.synthetic.features must be a mapping of names to whole numbers such as {name: 1}, or null, "
        "got '{text:'"
    ),
    "pretrain --data.synthetic.features.text x": (
        "pretrain: --data.synthetic.features.text must be a whole number, got 'x'"
    ),
    "pretrain --augmentation.view_a noise": (
        "pretrain: --augmentation.view_a must be a list of mappings such as [{name: value}], or null, got 'noise'"
    ),
    "pretrain --pretraining.frozen x": (
        "pretrain: --pretraining.frozen must be a mapping of names to true or false or a whole number each such as "
        "{name: true}, got 'x'"
    ),
    "experiment --experiment.methods [FS,XX]": (
        "config: experiment.methods must be some of FS, SLE, SSL, LE or YAML files of methods, got 'XX'"
    ),
    # the last one counts
    "pretrain --run.seed 1 --run.seed x": "pretrain: --run.seed must be a whole number, got 'x'",
    # sections at once
    "pretrain --run {seed:1}": "pretrain: --run: there is no setting run.seed:1; did you mean run.seed?",
    "pretrain --data none.yaml": "pretrain: configuration none.yaml: No such file or directory",
    # out of range
    "pretrain --data.path=": (
        "config: data.path must be a path or synthetic, or several paths, each once, got nothing"
    ),
    "experiment --experiment.seeds [0,0]": (
        "config: experiment.seeds must be at least one, each once and of 64 bits, got [0, 0]"
    ),
}
# What a file holds, and the sentence behind its name.
FILES = {
    "pretraining:\n  lrr: 1": "there is no setting pretraining.lrr; did you mean pretraining.lr?",
    "pretraning:\n  lr: 1": "there is no setting pretraning; did you mean pretraining?",
    "lr: 1": "there is no setting lr; did you mean pretraining.lr or supervised.lr?",
    "pretraining:\n  lr: fast": "pretraining.lr must be a number, got 'fast'",
    "pretraining:\n  lr:": "pretraining.lr must be a number, got null",
    "run: {seed: 1.5}": "run.seed must be a whole number, got 1.5",
    "run: {folder: [a]}": "run.folder must be text, got ['a']",
    "run: {accelerator: gpu}": (
        "run.accelerator must be one of auto, cpu, cuda, mps, got 'gpu'; did you mean cpu?"
    ),
    "data: {synthetic: {samples: many}}": "data.synthetic.samples must be a whole number, got 'many'",
    "model: {projector: 5}": "model.projector must be a list of whole numbers such as [1, 2], got 5",
    "pretraining: 3": "pretraining must hold settings, one a line such as 'name: value', got 3",
    "hello": "it must hold settings, one a line such as 'name: value', got 'hello'",
    "run: {seed: 1\n": "not YAML, line 2: expected ',' or '}', but got '<stream end>'",
    "experiment: {seeds: [1]}": "there is no setting experiment",
}


def refusal(capsys, *arguments: str) -> str:
    assert mmfast(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not re.search(r"Union|Parser key|<class|Literal|typing|Namespace|Traceback|argument --", line), (
        line
    )
    return re.sub(r" \(see mmfast[a-z ]* --help\)$", "", line.removeprefix("mmfast: "))


@pytest.mark.parametrize("line", LINES)
def test_wrong_flags_in_plain_words(line, capsys):
    assert refusal(capsys, *line.split()) == LINES[line]


@pytest.mark.parametrize("text", FILES)
def test_wrong_files_in_plain_words(text, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert refusal(capsys, "pretrain", f"--config={file}") == f"pretrain: configuration {file}: {FILES[text]}"


def test_flags_win_over_files_wherever_they_stand(tmp_path):
    (tmp_path / "a.yaml").write_text("run: {seed: 7, threads: 3}\nmodel: {hidden: 5}\n")
    (tmp_path / "b.yaml").write_text("run: {threads: 4}\n")
    files = [f"--config={tmp_path / 'a.yaml'}", "--config", str(tmp_path / "b.yaml")]
    for argv in (["--run.seed=3", *files, "--preset=demo"], [*files, "--preset", "demo", "--run.seed", "3"]):
        settings = pretrain(argv).settings
        assert (settings.run.seed, settings.run.threads, settings.model.hidden) == (3, 4, 5)
        assert settings.pretraining.batch_size == 128


def test_a_preset_in_a_file_is_refused_instead_of_ignored(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("preset: demo\n")
    assert refusal(capsys, "pretrain", f"--config={tmp_path / 'a.yaml'}") == (
        "pretrain: preset must be given as a flag, --preset NAME, not in a file"
    )


def test_help_lists_the_presets(capsys):
    with pytest.raises(SystemExit):
        mmfast("experiment", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "demo: a small model",
        "small: for hundreds of samples",
        "thesis: the settings as the thesis prints",
    ):
        assert words in text
