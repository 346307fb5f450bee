"""Processes that run one function together, as the ranks of a gloo group."""

import os
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Processes begin as copies of one that has imported what takes long, and has done nothing else.
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "mmfast.functional", "mmfast.cli.train", "mmfast.training.runs"])


class Ranks:
    """``size`` processes; a call that takes longer than ``patience`` seconds counts as a hang."""

    def __init__(self, size, folder, patience=120):
        self.size, self.patience = size, patience
        self.pipes, theirs = zip(*(CONTEXT.Pipe() for _ in range(size)), strict=True)
        arguments = [(rank, size, str(folder / "store"), pipe) for rank, pipe in enumerate(theirs)]
        self.processes = [CONTEXT.Process(target=_serve, args=args, daemon=True) for args in arguments]
        for process in self.processes:
            process.start()

    def __call__(self, function, *arguments, size=None):
        """``function(group, *arguments)`` on the first ``size`` ranks; what each returned, in their order.

        An exception on any of them is raised here.
        """
        size = size or self.size
        for pipe in self.pipes:
            pipe.send((function, size, arguments))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(self.patience):
                self.close()
                pytest.fail(f"rank {rank} hangs")
            results.append(pipe.recv())
        for failed, result in results:
            if failed:
                pytest.fail(result)
        return [result for _, result in results[:size]]

    def close(self):
        for process in self.processes:
            process.kill()


def _serve(rank, size, store, pipe):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    groups = {n: dist.new_group(range(n)) for n in range(1, size + 1)}
    while True:
        try:
            function, members, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, function(groups[members], *arguments) if rank < members else None))
        except Exception:
            pipe.send((True, f"rank {rank} of {members}:\n{traceback.format_exc()}"))
