"""Other libraries' own code, where it is: installed, or unpacked in the folder that MMFAST_PEERS names.

A module is loaded without its packages' ``__init__``, which may want more than the module does.
"""

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch


def folder_of(package):
    folder = os.environ.get("MMFAST_PEERS")
    if folder and (Path(folder) / package).is_dir():
        return Path(folder) / package
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed, and MMFAST_PEERS names no folder with it")
    return Path(found.submodule_search_locations[0])


def theirs(module, *, whole=(), instead=None):
    """The module by its full name; ``whole``: subpackages that are loaded as they are.

    ``instead``: name -> namespace, in the place of modules that it imports and the test does not need.
    """
    package = module.partition(".")[0]
    folder = folder_of(package)
    before = {name: x for name, x in sys.modules.items() if name.split(".")[0] == package}
    for name in before:
        del sys.modules[name]
    try:
        parts = module.split(".")
        for name, names in (instead or {}).items():
            stub = sys.modules[name] = types.ModuleType(name)
            vars(stub).update(names)
        bare = {".".join(parts[:i]) for i in range(1, len(parts))}
        bare |= {
            ".".join(name.split(".")[:i]) for name in instead or {} for i in range(1, name.count(".") + 1)
        }
        for path in folder.rglob("__init__.py"):
            bare.add(".".join((package, *path.parent.relative_to(folder).parts)))
        for name in bare - set(whole) - set(instead or {}):
            stub = sys.modules[name] = types.ModuleType(name)
            stub.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        return importlib.import_module(module)
    except ModuleNotFoundError as problem:
        pytest.skip(f"{module} wants {problem.name}")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
        sys.modules.update(before)


def lightly_nt_xent():
    def concat_all_gather(x):
        every = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(every, x)
        return torch.cat(every)

    instead = {"lightly.models.utils": {"concat_all_gather": concat_all_gather}}
    return theirs("lightly.loss.ntx_ent_loss", instead=instead).NTXentLoss


def metric_learning(name):
    """A class of pytorch-metric-learning by its module and name, such as "losses.NTXentLoss"."""
    package = "pytorch_metric_learning"
    kind, _, name = name.partition(".")
    whole = [f"{package}.{x}" for x in ("losses", "distances", "reducers", "miners")]
    return getattr(theirs(f"{package}.{kind}", whole=whole), name)


def sentence_transformers(name, file):
    def cos_sim(a, b):
        return torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T

    package = "sentence_transformers"
    util = {"cos_sim": cos_sim, "pytorch_cos_sim": cos_sim, "get_rank": lambda: 0}
    instead = {
        f"{package}.base.losses.merged_forward": {"embed_columns": None},
        f"{package}.sentence_transformer.model": {"SentenceTransformer": torch.nn.Module},
        f"{package}.util": util | {"all_gather_with_grad": None, "similarity_fct_name": None},
    }
    return getattr(theirs(f"{package}.sentence_transformer.losses.{file}", instead=instead), name)
