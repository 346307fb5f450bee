"""Processes that run one command together: how they meet, and that they end together.

Lightning starts the processes or finds those of torchrun or SLURM, and PyTorch's process group connects them. Beside
it each process holds a connection to process 0: the system closes it at once when a process ends, however that comes
about, while a collective may wait half an hour for one that is no more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from subprocess import Popen
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment

from mmfast.errors import UserError
from mmfast.training.config import RunConfig
from mmfast.training.launched import by_slurm, several, speaks
from mmfast.training.processes import agreed, is_main, rank, world_size

FAULT, USER_ERROR, INTERRUPTED = 1, 2, 130
# Seconds: for a process to end in its own way after another one has; to hear why a collective failed; to connect.
GRACE, HEARING, CONNECTING = 5.0, 2.0, 60.0
# By which a process that Lightning starts knows who started it.
LAUNCHED_BY = "MMFAST_LAUNCHED_BY"


@contextlib.contextmanager
def joined(run: RunConfig, again: Callable[[], str] = str) -> Iterator[None]:
    """Within the context all processes of the run are there, and only the first one writes to the terminal.

    What ends one of them ends all, with the same status: the first one says why, or the others do where it died. At
    the end of the context the first one alone goes on. A run of a single process is left as it is.

    Args:
        again: how to go on; completes the sentence about a process that died.

    Raises:
        UserError: the processes cannot meet.
    """
    if not several(run):
        yield
        return
    _meet(run)
    watch = _Watch(again)
    try:
        with contextlib.nullcontext() if is_main() else _silent():
            yield
    except BaseException as error:
        watch.end_by(error)
        raise
    watch.leave()
    if not is_main():
        _exit(0)


def environment_plugins() -> list[Any]:
    """For Lightning: SLURM must not submit a run again, which would start from a file that we do not write."""
    return [SLURMEnvironment(auto_requeue=False)] if by_slurm() else []


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's advertisements and hints, which are about choices already made here."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _meet(run: RunConfig) -> None:
    try:
        with quiet():
            fabric = Fabric(
                accelerator=run.accelerator,
                devices=run.devices,
                num_nodes=run.nodes,
                strategy="ddp",
                plugins=environment_plugins(),
            )
            children = fabric.strategy.launcher.procs
            with _until_met(children):
                fabric.launch()
    except (dist.DistError, RuntimeError, ValueError) as error:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"run: the processes cannot meet at {where}: {reason}") from error
    # Lightning would kill this process, too, when one of them dies, before it could say why.
    children.clear()


@contextlib.contextmanager
def _until_met(children: list[Popen]) -> Iterator[None]:
    """Ends this process when one that Lightning started dies before they have met, or the one that started it."""
    parent, met = os.environ.get(LAUNCHED_BY), threading.Event()
    os.environ[LAUNCHED_BY] = str(os.getpid())

    def watch() -> None:
        while not met.wait(0.5):
            if parent is not None and int(parent) != os.getppid():
                os._exit(FAULT)
            statuses = {child.poll() for child in list(children)} - {None}
            if INTERRUPTED in statuses:
                _exit(INTERRUPTED, "interrupted")
            if statuses:
                _exit(FAULT, "a process ended before all had met")

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        met.set()
        os.environ.pop(LAUNCHED_BY)


class _End(NamedTuple):
    """How a process ended: its exit status, 0 if all is well, why, and whether the run can go on from there."""

    status: int
    sentence: str = ""
    goes_on: bool = False


class _Watch:
    """A connection between process 0 and each other one, on which a process says how it ends."""

    def __init__(self, again: Callable[[], str]) -> None:
        self._again = again
        self._lock, self._heard = threading.Lock(), threading.Event()
        self._left, self._end = False, _End(0)
        self._peers = _connected()
        for number, peer in self._peers.items():
            threading.Thread(target=self._listen, args=(number, peer), daemon=True).start()

    def leave(self, end: _End = _End(0)) -> None:  # noqa: B008 - immutable
        """Say how this process ends."""
        self._left = True
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(json.dumps(end).encode() + b"\n")

    def end_by(self, error: BaseException) -> None:
        """End with all other processes; returns in process 0 where the error is its own, and is yet to be raised."""
        own = isinstance(error, (UserError, KeyboardInterrupt))
        if not own:
            self._heard.wait(HEARING)  # a collective fails a little before it is known why
        if self._heard.is_set() and not isinstance(error, UserError):
            self._end_all()
        if isinstance(error, UserError):
            end = _End(USER_ERROR, str(error))
        elif isinstance(error, KeyboardInterrupt):
            end = _End(INTERRUPTED, "interrupted", goes_on=True)
        else:
            end = _End(FAULT, f"process {rank()} of {world_size()} failed, its error stands above")
        if is_main():
            self.leave(_End(end.status))  # what process 0 says is enough
            return
        self.leave(end)
        if not own:
            traceback.print_exception(error, file=sys.__stderr__)
        _exit(end.status)

    def _listen(self, number: int, peer: socket.socket) -> None:
        line = ""
        with contextlib.suppress(OSError):
            line = peer.makefile().readline()
        died = _End(FAULT, f"process {number} of {world_size()} died", goes_on=True)
        end = _End(*json.loads(line)) if line.endswith("\n") else died
        with self._lock:
            if end.status == 0 or self._left or self._heard.is_set():
                return
            self._end = end
            self._heard.set()
        if is_main():
            self.leave(_End(end.status))
        # The process may not notice by itself, as where it waits for a GPU that waits for others.
        time.sleep(GRACE)
        self._end_all()

    def _end_all(self) -> NoReturn:
        with self._lock:
            status, sentence, goes_on = self._end
            hint = self._again() if goes_on else ""
            # Where process 0 died, not all of the others need say so.
            said = sentence and (rank() <= 1 or speaks())
            _exit(status, f"{sentence}; {hint}" if said and hint else sentence if said else "")


def _connected() -> dict[int, socket.socket]:
    """rank -> connection: from process 0 to all others, from them to process 0."""
    server = None

    def opened() -> tuple[int, str]:
        nonlocal server
        both = socket.has_dualstack_ipv6()
        server = socket.create_server(
            ("", 0),
            family=socket.AF_INET6 if both else socket.AF_INET,
            dualstack_ipv6=both,
            backlog=world_size(),
        )
        return server.getsockname()[1], secrets.token_hex(16)

    port, token = agreed(opened)
    if not is_main():
        peer = socket.create_connection((os.environ["MASTER_ADDR"], port), CONNECTING)
        peer.sendall(f"{token} {rank()}\n".encode())
        return {0: _kept_alive(peer)}
    peers: dict[int, socket.socket] = {}
    with server:
        server.settimeout(CONNECTING)
        while len(peers) < world_size() - 1:
            peer, _ = server.accept()
            peer.settimeout(CONNECTING)
            said, _, number = peer.makefile().readline().strip().partition(" ")
            if secrets.compare_digest(said, token):
                peers[int(number)] = _kept_alive(peer)
    return peers


def _kept_alive(peer: socket.socket) -> socket.socket:
    """That waits for ever, yet notices within a minute or two that the other machine is gone."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return peer


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _exit(status: int, sentence: str = "") -> NoReturn:
    """End at once: what is left to tidy up may wait for other processes."""
    if sentence:
        # A progress bar may have hidden the cursor.
        show = "\x1b[?25h" if sys.__stdout__ is not None and sys.__stdout__.isatty() else ""
        print(f"{show}mmfast: {sentence}", file=sys.__stderr__)
    for stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)
