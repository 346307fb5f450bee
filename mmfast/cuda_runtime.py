"""What the CUDA runtime within ``mmfast._C`` says of this machine.

Asking initialises the driver, and processes forked afterwards cannot use it. So this file is also a program that
asks in a process of its own: ``python cuda_runtime.py LIBRARY``. It needs neither torch nor mmfast.
"""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location


def facts(library) -> dict:
    """Asked in this process.

    Returns:
        ``devices``: how many there are, or minus CUDA's error; ``capabilities``: one number each, such as 89;
        ``runtime`` and ``driver``: the CUDA versions of the runtime and of the newest one that the driver serves,
        as 1000 major + 10 minor, 0 without a driver.
    """
    devices = library.cuda_device_count()
    return {
        "devices": devices,
        "capabilities": [library.cuda_capability(index) for index in range(devices)],
        "runtime": library.cuda_runtime_version(),
        "driver": max(library.cuda_driver_version(), 0),
    }


def facts_from_elsewhere(library) -> dict:
    """The same, asked in a process of its own."""
    # -I: neither the environment nor the files beside this one decide what it imports.
    command = [sys.executable, "-I", __file__, library.__file__]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"mmfast: its CUDA runtime could not be asked for devices: {run.stderr.strip()}")
    return json.loads(run.stdout)


def version(number: int) -> str:
    """``13.0`` of 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


def main() -> None:
    spec = spec_from_file_location("_C", sys.argv[1])
    library = module_from_spec(spec)
    spec.loader.exec_module(library)
    print(json.dumps(facts(library)))


if __name__ == "__main__":
    main()
