"""Whether the largest step of a run fits into memory: asked before it, for the kernel that kills says nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from mmfast.errors import UserError
from mmfast.models import M3Encoder
from mmfast.models.layers.attention import KEPT_SCORES
from mmfast.training.config import RunConfig
from mmfast.training.model_section import blamed
from mmfast.training.processes import world_size

# Size of the batch that is measured. Batch normalisation needs two samples, and is refused where a batch has one.
# From a few hundred steps on, what a step of time costs is the same.
MEASURED, MEASURED_STEPS = 2, 1000
# Gradients and temporary results of a backward pass, over what the forward pass keeps for it.
BACKWARD = 1.35
# The same where attention goes in blocks, whose gradients leave holes in the heap: 1.6 to 2.4 times were seen.
BACKWARD_IN_BLOCKS = 2.4
# oneDNN's LSTM asks for more workspace (bytes, to autograd) than it touches: 32 to 68 % of it.
WORKSPACE = 0.6


def check_memory(
    phase: str, encoder: nn.Module, loader: DataLoader, views: int, run: RunConfig, processes: int = 1
) -> None:
    """Refuse a run whose largest batch, its ``views`` encoded at once, needs more memory than is free.

    Args:
        phase: "pretraining" or "supervised", the section that has the batch size.
        encoder: with ``features``, modality -> F; run once, on samples of zeros.
        loader: batches of :class:`~mmfast.data.MultimodalBatch` by a bucket sampler, whose first epoch is looked at.
        processes: how many such runs are going to share what is free now.

    Raises:
        UserError: with the sizes, and the batch size that would fit.
    """
    free = free_bytes(run.accelerator)
    longest = loader.dataset.longest()
    batches = [(len(batch), int(longest[batch].max())) for batch in loader.batch_sampler.batches(0) if batch]
    samples, steps = max(batches, key=lambda batch: batch[0] * batch[1])
    if free is None or steps == 0:
        return
    # Over several processes batch normalisation is over the samples of all.
    fewest = min([MEASURED, *(size for size, _ in batches if world_size() == 1)])
    need = samples * sample_bytes(encoder, steps, views, fewest)
    if not _on_gpu(run.accelerator):
        free /= run.devices
    if need * processes > free:
        fitting = int(samples * world_size() * free / processes / need)
        least = 2 if views > 1 else 1
        remedy = f"lower {phase}.batch_size to {fitting}" if fitting >= least else _smaller(encoder)
        if processes > 1:
            remedy = f"lower experiment.workers, {processes} here, {remedy}"
        raise UserError(
            f"{phase}: memory for a step must be free, about {_gib(need)} GiB for {samples} samples of up to {steps} "
            f"time steps, got {_gib(free / processes)} GiB: {remedy}, or {_shorter(encoder)}"
        )


def _shorter(encoder: nn.Module) -> str:
    waveforms = encoder.features.get("speech") == 1
    return "take spectrograms of the waveforms" if waveforms else "shorten the sequences"


def check_weights(setting: str, value: Any, build: Callable[[], nn.Module]) -> None:
    """Refuse a network that cannot be built: its weights, their gradients and Adam's two moments exceed free memory.

    Args:
        setting, value: what decides the size.
        build: makes the network; called on the meta device, where nothing is allocated.

    Raises:
        UserError: with the sizes.
    """
    with torch.device("meta"):
        try:
            need = 4 * sum(parameter.nbytes for parameter in build().parameters())
        except UserError:
            raise
        except Exception as error:
            if "overflow" in str(error):  # more bytes than a number of 64 bits counts
                raise UserError(
                    f"config: {setting} must be a size that a tensor can have, got {value}"
                ) from error
            # A user's constructor that reads an element; whatever else is wrong shows when it is built in earnest.
            return
    free = free_bytes("cpu")
    if free is not None and need > free:
        raise UserError(
            f"config: {setting} must leave the weights, gradients and Adam's moments within the free memory of "
            f"{_gib(free)} GiB, got {value}, that is {_gib(need)} GiB"
        )


def sample_bytes(encoder: nn.Module, steps: int, views: int, samples: int = MEASURED) -> int:
    """About what a training step takes for each sample of so many time steps, by what autograd keeps for a few."""
    measured = min(steps, MEASURED_STEPS)
    values, lengths = zeros(encoder, dict.fromkeys(encoder.features, [measured] * samples))
    weights = {p.data_ptr() for p in encoder.parameters()}
    kept: dict[int, torch.Tensor] = {}  # by address, and alive, so that no address is used twice

    def keep(x: torch.Tensor) -> torch.Tensor:
        address = x.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = x
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    kind = type(encoder)
    blame = blamed(
        kind.__qualname__, kind.__module__, f"that takes a batch of {samples} with {measured} time steps"
    )
    with untouched(encoder), torch.enable_grad(), hooks, blame:
        encoder.train()(values, lengths)
    inputs = sum(x.nbytes for x in values.values())
    total = sum(
        x.untyped_storage().nbytes() * (WORKSPACE if x.dtype == torch.uint8 else 1) for x in kept.values()
    )
    backward = BACKWARD if steps**2 <= KEPT_SCORES else BACKWARD_IN_BLOCKS
    return int((inputs + views * backward * total) / samples * steps / measured)


def zeros(
    encoder: nn.Module, lengths: Mapping[str, Sequence[int]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A batch of zeros, values and lengths, in the encoder's dtype and on its device."""
    parameter = next(encoder.parameters(), torch.empty((), device="cpu"))
    like = {"dtype": parameter.dtype, "device": parameter.device}
    values = {m: torch.zeros(len(n), max(n), encoder.features[m], **like) for m, n in lengths.items()}
    return values, {m: torch.tensor(n, device=parameter.device) for m, n in lengths.items()}


@contextlib.contextmanager
def untouched(encoder: nn.Module) -> Iterator[None]:
    """Mode, buffers and random state are afterwards what they were."""
    training, buffers = encoder.training, [(buffer, buffer.clone()) for buffer in encoder.buffers()]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            encoder.train(training)
            for buffer, before in buffers:
                buffer.copy_(before)


def _smaller(encoder: nn.Module) -> str:
    return "lower model.hidden" if isinstance(encoder, M3Encoder) else "make the encoder smaller"


def free_bytes(accelerator: str) -> int | None:
    """Memory that this process may still take, on the GPU where it will run there; None where nothing tells."""
    if _on_gpu(accelerator):
        return torch.cuda.mem_get_info()[0]
    return min(filter(None, (_available(), _within_limits())), default=None)


def _on_gpu(accelerator: str) -> bool:
    return accelerator in ("auto", "cuda") and torch.cuda.is_available()


def _available() -> int | None:
    rows = dict(line.split(":", 1) for line in _lines("/proc/meminfo"))
    return 1024 * int(rows["MemAvailable"].split()[0]) if "MemAvailable" in rows else None


def _within_limits() -> int | None:
    """What control groups leave, those of containers and batch jobs; files that are merely cached count as free."""
    left = []
    for group in _lines("/proc/self/cgroup"):
        _, controllers, path = group.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, limit, usage, cached = _SECOND if controllers == "" else _FIRST
        for folder in (Path(root + path), *Path(root + path).parents):
            most, used = _lines(folder / limit), _lines(folder / usage)
            if most and used and most[0].isdigit():
                files = [
                    int(row.split()[1]) for row in _lines(folder / "memory.stat") if row.startswith(cached)
                ]
                left.append(max(int(most[0]) - int(used[0]) + sum(files), 1))
    return min(left, default=None)


# Where the two versions of control groups are mounted, and the names of limit, usage and cached files.
_SECOND = ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file ")
_FIRST = (
    "/sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file ",
)


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"
