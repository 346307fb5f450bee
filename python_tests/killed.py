"""The command line in a process that is killed in the middle of a training step, as by a machine that goes down."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from ranks import CONTEXT

from mmfast.cli.main import main
from mmfast.training.module import StageModule


def killed(at: int, arguments: list[str], stage: str | None = None) -> None:
    """Run a command that must be killed in this step, of the stage of this name or of any."""
    process = CONTEXT.Process(target=_run, args=(at, stage, [str(word) for word in arguments], Path.cwd()))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _run(at, stage, arguments, folder):
    os.chdir(folder)
    step = StageModule.training_step

    def deadly(self, batch, batch_idx):
        if self.global_step == at and stage in (None, self.stage.name):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, batch_idx)

    StageModule.training_step = deadly
    sys.exit(main(arguments))
