"""README and docs/: every snippet runs; the files, links, flags and imports that they name are there."""

from __future__ import annotations

import importlib
import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from layouts import csd, foreign, mfn, misa, mmsa, mult, slp, sound, tailor
from training_help import TINY, mmfast

from mmfast.cli.main import COMMANDS
from mmfast.data import save, synthetic

TOP = Path(__file__).parents[1]
PAGES = {page.name: page for page in (TOP / "README.md", *sorted((TOP / "docs").glob("*.md")))}
LANGUAGES = ("python", "sh", "yaml", "text")
# Commands that train get settings that make them small, but for what M3 alone takes.
SMALL = [flag for flag in TINY if "--model.hidden" not in flag]
SMALL += ["--pretraining.epochs=1", "--supervised.epochs=1"]
FLAGS = {"experiment": [*SMALL, "--experiment.seeds=[0]", "--experiment.workers=1"]}
FLAGS |= dict.fromkeys(("pretrain", "finetune", "train"), SMALL)
# A word of a command that is parsed and not run -> why.
PARSED = {
    "ict_mmmo": "the corpus is no part of the project",
    "runs/all": "an experiment of more is run further down the page",
    "torchrun": "more than one process has tests of its own",
    "--run.devices": "more than one process has tests of its own",
    "srun": "there is no SLURM here",
}


# What docs/data.md calls a file or folder of somebody else's layout -> what writes a small one.
CORPORA = {
    "cmu_mosei": lambda folder: csd.write(folder, 7),
    "mosi_data.pkl": mult.write_aligned,
    "mosei_senti_data_noalign.pkl": mult.write_apart,
    "iemocap_data.pkl": mult.write_pairs,
    "aligned_50.pkl": mmsa.write_aligned,
    "unaligned_39.pkl": mmsa.write_apart,
    "feature.pkl": mmsa.write_extracted,
    "mosei_unpadded.p": slp.write_padded,
    "MOSI": misa.write_folder,
    "mosi.pkl": misa.write_mag,
    "mfn": lambda folder: mfn.write(folder, mfn.MOSI, mfn.sentiment),
    "pom": lambda folder: mfn.write(folder, mfn.MOSI, mfn.ratings),
    "joint": mfn.write_joint,
    "aligned.pt": tailor.write_torch,
    "arrays.npz": lambda folder: foreign.npz(folder, foreign.keyed("/")),
    "emodb": sound.write_emodb,
    "ravdess": sound.write_ravdess,
    "iemocap": sound.write_iemocap,
    "recordings": sound.write_table,
    "glove.txt": lambda folder: misa.write_folder(folder).with_name("vectors.txt"),
}


class Block(NamedTuple):
    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The name of the file that a block is, by its first line such as ``# NAME.py``."""
        found = re.match(r"# ([\w.-]+\.(?:py|yaml))\n", self.text)
        return found and found[1]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(m[1], m[2], text.count("\n", 0, m.start(2))) for m in found]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each line of a shell block; lines that end in a backslash go on."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty folder but for a user's data, with the features of the tiny synthetic ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    save(synthetic(80, max_length=6, features={"text": 8, "audio": 6, "visual": 4}), tmp_path / "mine.npz")
    return tmp_path


@pytest.mark.parametrize("name", PAGES)
def test_snippets_run_as_they_stand_from_the_top_of_the_page_to_its_end(name, workplace, capfd, monkeypatch):
    namespace = {"__name__": "snippets"}
    for block in blocks(PAGES[name]):
        assert block.language in LANGUAGES, f"{name}, line {block.line}: a block of {LANGUAGES} is wanted"
        if block.file:
            Path(block.file).write_text(block.text)
        if block.language == "python":
            # Behind empty lines, so that an error's line is that of the page.
            exec(compile("\n" * block.line + block.text, str(PAGES[name]), "exec"), namespace)
        elif block.language == "yaml":
            assert block.file, f"{name}, line {block.line}: a YAML block must begin with # NAME.yaml"
            assert isinstance(yaml.safe_load(block.text), dict)
        elif block.language == "sh":
            with monkeypatch.context() as patch:
                for variable, value in slurm(block).items():
                    patch.setenv(variable, value)
                for words in commands(block):
                    run(words, capfd)


def slurm(block: Block) -> dict[str, str]:
    """What srun says to the tasks of a job with the #SBATCH lines of a block, if it has any."""
    asked = dict(re.findall(r"^#SBATCH --(nodes|ntasks-per-node)=(\d+)$", block.text, re.MULTILINE))
    if not asked:
        return {}
    nodes, tasks = asked["nodes"], asked["ntasks-per-node"]
    total = str(int(nodes) * int(tasks))
    return {"SLURM_NNODES": nodes, "SLURM_NTASKS_PER_NODE": tasks, "SLURM_NTASKS": total}


def run(words: list[str], capfd) -> None:
    """Run a command of mmfast, or see that another one's files and targets are there."""
    line, words = shlex.join(words), list(words)
    only_parsed = bool(PARSED.keys() & set(words))
    while "=" in words[0]:  # a variable in front of the command
        assert known_variable(words.pop(0).partition("=")[0]), line
    if words[0] in ("torchrun", "srun"):
        words = words[words.index("mmfast") :]
    program, *arguments = words
    for name in CORPORA.keys() & set(arguments):
        written(name)
    if program == "mmfast":
        command = arguments[0]
        assert command in COMMANDS, line
        if only_parsed:
            getattr(importlib.import_module(COMMANDS[command][0]), command)(arguments[1:])
        else:
            status = mmfast(*arguments, *FLAGS.get(command, []))
            assert status == 0, f"{line}: {capfd.readouterr().err}"
    elif program == "make":
        targets = re.findall(r"^(\w+):", (TOP / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets), line
    elif program == "pip":
        assert arguments[0] == "install" and re.fullmatch(r"\.(\[(\w+)\])?", arguments[1]), line
        extras = re.findall(r"^(\w+) = \[$", (TOP / "pyproject.toml").read_text(), re.MULTILINE)
        assert arguments[1] == "." or arguments[1][2:-1] in extras, line
    elif program == "export":
        assert all(known_variable(argument.partition("=")[0]) for argument in arguments), line
    else:
        assert (TOP / program).is_file(), f"{line}: no such file, and no known program"


def written(name: str) -> None:
    """Write the small file of a layout under this name, unless it is there."""
    if not Path(name).exists():
        folder = Path(".written", name)
        folder.mkdir(parents=True)
        CORPORA[name](folder).rename(name)


def known_variable(name: str) -> bool:
    """Whether a source reads the environment variable; those of other projects are theirs."""
    sources = [TOP / "setup.py", *(TOP / "mmfast").rglob("*.py"), *(TOP / "python_tests").glob("*.py")]
    return not name.startswith("MMFAST_") or any(name in source.read_text() for source in sources)


def slug(heading: str) -> str:
    """What GitHub calls a heading in links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)}


@pytest.mark.parametrize("name", PAGES)
def test_links_and_paths_lead_to_files_and_headings(name):
    page, text = PAGES[name], prose(PAGES[name])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target
    folders = "csrc|mmfast|python_tests|benchmarks|docs|tools|[.]ci"
    for path in re.findall(rf"`((?:{folders})/[\w./*-]*)`", text):
        assert "NAME" in path or list(TOP.glob(path.rstrip("/"))), path


@pytest.mark.parametrize("name", PAGES)
def test_flags_and_imports_in_the_text_exist(name):
    text = prose(PAGES[name])
    for flag in re.findall(r"`(--[a-z_.]*[a-z_])", text):
        assert any(known == flag or known.startswith(f"{flag}.") for known in flags()), flag
    for line in re.findall(r"`(from mmfast[\w.]* import [\w, ]+)`", text):
        exec(line, {})


@lru_cache
def flags() -> set[str]:
    """What the help of the commands offers."""
    text = io.StringIO()
    with redirect_stdout(text):
        for command in COMMANDS:
            with pytest.raises(SystemExit):
                mmfast(command, "--help")
    return set(re.findall(r"--[a-z_.]*[a-z_]", text.getvalue()))


def test_every_page_is_reached_from_the_readme():
    linked = set(re.findall(r"\(docs/(\w+\.md)[#)]", PAGES["README.md"].read_text()))
    assert linked == set(PAGES) - {"README.md"}


def test_the_readme_is_three_screens():
    lines = PAGES["README.md"].read_text().splitlines()
    assert len(lines) <= 125 and max(map(len, lines)) <= 100
