"""Importing: no torch for the command line, all operations for torch, names for everybody."""

from __future__ import annotations

import ast
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmfast

# Whichever module comes first, each is in the middle of its own imports when torch is.
FIRST = [
    "mmfast",
    *(
        pytest.param(module, marks=pytest.mark.rotation(i))
        for i, module in enumerate(["mmfast.backends", "mmfast.data", "mmfast.ops.products", "mmfast.triton"])
    ),
]


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import mmfast; dir(mmfast); mmfast.UserError",
        "from mmfast.cli.main import main; main(['--version'])",
        "from mmfast.cli.main import main; main(['--help'])",
        "from mmfast.cli.main import main; main(['pretrain', '--model.encoder=M3Encoder', '--help'])",
        "from mmfast.cli.main import main; assert main(['experiment', '--run.seed=x']) == 2",
        "from mmfast.cli.main import main; assert main(['evaluate']) == 2",
        "from mmfast.cli.main import main; assert main(['embed']) == 2",
        "import mmfast.training; dir(mmfast.training)",
    ],
)
def test_no_torch_is_imported_for(code):
    heavy = "{'torch', 'numpy', 'lightning', 'torchmetrics', 'sklearn', 'scipy', 'matplotlib', 'h5py'}"
    watch = f"import atexit, os, sys; atexit.register(lambda: os._exit(bool({heavy} & set(sys.modules))));"
    run(watch + code)


def test_help_of_a_command_takes_a_fraction_of_importing_torch():
    times = "import os, sys; sys.stdout = open(os.devnull, 'w');"
    clock = "t = os.times(); print(t.user + t.system, file=sys.stderr)"

    def cpu_seconds(code: str) -> float:
        done = subprocess.run([sys.executable, "-c", times + code], capture_output=True, text=True)
        return float(done.stderr)

    of_torch = cpu_seconds("import torch;" + clock)
    for argument in (["--version"], ["pretrain", "--help"]):
        code = f"from mmfast.cli.main import main\ntry: main({argument})\nexcept SystemExit: pass\n" + clock
        assert cpu_seconds(code) < 0.5 * of_torch


@pytest.mark.parametrize("first", FIRST)
def test_operations_are_registered_once_mmfast_and_torch_are_imported(first):
    run(f"import {first}; import torch; torch.ops.mmfast.augment_draw; torch.ops.mmfast.augment_apply")


def test_looking_for_torch_without_importing_it_changes_nothing():
    run(
        "import mmfast, importlib.util; importlib.util.find_spec('torch'); import torch; import sys;"
        "torch.ops.mmfast.augment_draw; assert not [f for f in sys.meta_path if 'Torch' in type(f).__name__]"
    )


class Noisy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.noise = mmfast.GaussianNoise(sigma=0.5, p=1.0)

    def forward(self, x):
        return self.noise(x, seed=7)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "noisy.pt2"
    program = torch.export.export(Noisy(), (torch.ones(2, 3, 4),))
    assert "mmfast.augment_apply" in str(program.graph)
    torch.export.save(program, path)
    return path


@pytest.mark.parametrize("order", ["import mmfast, torch", "import torch, mmfast"])
def test_exported_programs_load_after_import_mmfast(order, exported):
    printed = run(
        f"{order}; import sys; program = torch.export.load(sys.argv[1]);"
        "print(program.module()(torch.ones(2, 3, 4)).tolist())",
        str(exported),
    )
    assert ast.literal_eval(printed) == Noisy()(torch.ones(2, 3, 4)).tolist()


def test_names_are_the_same_however_they_are_reached():
    for module, names in mmfast.EXPORTS.items():
        for name in names:
            assert getattr(mmfast, name) is getattr(getattr(mmfast, module), name)
            assert name in mmfast.__all__ and name in dir(mmfast)
        assert module in dir(mmfast)
    assert set(mmfast.__all__) == {name for names in mmfast.EXPORTS.values() for name in names}
    everything: dict = {}
    exec("from mmfast import *", everything)
    assert set(mmfast.__all__) <= set(everything)
    assert "functional ok" in run("import mmfast; mmfast.functional.barlow_twins; print('functional ok')")
    with pytest.raises(AttributeError, match="module 'mmfast' has no attribute 'SeqAugs'"):
        mmfast.SeqAugs  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'SeqAugs'"):
        from mmfast import SeqAugs  # noqa: F401


def test_type_checkers_see_the_names_of_the_table():
    tree = ast.parse(Path(mmfast.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen: dict[str, list[str]] = {}
    for node in block.body:
        assert all(alias.asname in (None, alias.name) for alias in node.names)
        seen.setdefault(node.module.partition(".")[2], []).extend(alias.name for alias in node.names)
    assert seen.pop("") == [module for module, names in mmfast.EXPORTS.items() if not names]
    assert seen == {module: list(names) for module, names in mmfast.EXPORTS.items() if names}


def test_pickles_know_where_they_come_from():
    noise = run("import pickle, mmfast; print(pickle.dumps(mmfast.GaussianNoise(sigma=0.25)).hex())")
    assert pickle.loads(bytes.fromhex(noise)).sigma == 0.25
    assert pickle.loads(pickle.dumps(mmfast.UserError)) is mmfast.UserError


def test_version_is_the_same_everywhere():

    from mmfast.backends import info

    assert mmfast.__version__ == mmfast.version.__version__
    assert info()["mmfast"] == mmfast.__version__
    # What is installed may be another checkout's; the build reads the attribute without importing the package.
    built = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=Path(mmfast.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert built.stdout.split()[-1] == mmfast.__version__


# A module in each stretch of a command's imports.
@pytest.mark.parametrize(
    "module", ["argparse", "jsonargparse._namespace", "torch._C", "torch.nn", "lightning.fabric"]
)
def test_interruption_while_importing_leaves_no_traceback(module):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "mmfast", "pretrain", "--data.path=none"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells let what they start in the background ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stderr:
        if line.split("|")[-1].strip().startswith(module):
            break
    process.send_signal(signal.SIGINT)
    rest = [line for line in process.stderr if not line.startswith("import time:")]
    process.stdout.close()
    assert process.wait() == 130, rest
    assert rest == ["mmfast: interrupted\n"]
