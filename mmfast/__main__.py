"""The program ``mmfast``, and ``python -m mmfast``."""

import os
import signal
import sys


def main() -> int:
    """Run the command line of this process; returns the exit status.

    Until a command starts its work, Ctrl-C ends the process where it stands: nothing is open yet, and many libraries
    catch what interrupts their import.
    """
    # Hints of PyTorch's C++ about choices already made here; what fails still says so.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # it may be ignored, as in the background of a shell
        signal.signal(signal.SIGINT, _leave)
    from mmfast.cli import main as cli

    return cli.main(sys.argv[1:], ready=lambda: signal.signal(signal.SIGINT, before))


def _leave(*_) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, b"mmfast: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
