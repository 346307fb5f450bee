"""Builds ``mmfast._C``: torch-free kernels, one object per instruction set, plus CUDA where nvcc is found.

Environment
    MMFAST_NATIVE   unset: build the kernels if a C++ compiler works; 0: never; 1: fail if it does not work.
    MMFAST_CUDA     unset: build CUDA kernels if nvcc works; 0: never; 1: fail if it does not work; emulate: compile
                    them for the CPU, where CUDA's threads are fibers (csrc/cuda/emulation.h; tests only).
    MMFAST_CUDA_ARCHS   compute capabilities, default "80 90 100"; PTX is added for the newest.
    MMFAST_SANITIZE     for example "address,undefined": instrument the kernels (tests only).
    CXX, NVCC, MAX_JOBS as usual.

What was built, and why something was not, is written to ``mmfast/_build.json`` (see ``mmfast info``).
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU_SOURCES = sorted(Path("csrc/cpu").glob("*.cpp"))
CUDA_SOURCES = sorted(Path("csrc/cuda").glob("*.cu"))

# Every CPU kernel is compiled once per row; the row is chosen at run time (csrc/cpu/kernels.h).
ISAS = {"generic": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    ISAS |= {"avx2": avx2, "avx512": avx2 + avx512}

# Elements move as bit patterns of their size, hence -fno-strict-aliasing. No -ffast-math: NaN and infinities
# must stay visible; -fno-math-errno and -fno-trapping-math drop only errno and floating-point traps.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def switch(name):
    """None (best effort), False (off) or True (must succeed)."""
    values = {"": None, "0": False, "1": True} | ({"emulate": "emulate"} if name == "MMFAST_CUDA" else {})
    value = os.environ.get(name, "")
    if value not in values:
        raise SystemExit(
            f"setup.py: {name} must be unset, {' or '.join(filter(None, values))}, got {value!r}"
        )
    return values[value]


def first_line(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def compile_rule(name, compiler):
    return (
        f"rule {name}\n  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc"
    )


class NinjaFile:
    """The few lines of ninja syntax this build needs."""

    def __init__(self, cxx):
        self.lines = [
            compile_rule("cxx", cxx),
            f"rule link\n  command = {cxx} -shared $in -o $out $flags",
        ]
        self.objects = []

    def compile(self, rule, source, tag, flags):
        target = f"{source.stem}.{tag}.o"
        self.lines.append(f"build {target}: {rule} {ROOT / source}\n  flags = {' '.join(flags)}")
        self.objects.append(target)

    def text(self, target, link_flags):
        link = f"build {target}: link {' '.join(self.objects)}\n  flags = {' '.join(link_flags)}"
        return "\n".join([*self.lines, link, f"default {target}", ""])


def find_nvcc():
    """(nvcc, its toolkit's library folder) or raises with the reason."""
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME")
    if not nvcc and home and (Path(home) / "bin/nvcc").exists():
        nvcc = str(Path(home) / "bin/nvcc")
    if not nvcc:
        raise RuntimeError("nvcc was not found on PATH, in NVCC or in CUDA_HOME")
    # nvcc may be a wrapper script, so its own dry run is what knows where the toolkit is.
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    ).stderr
    top = next((ln.split("TOP=")[1].strip() for ln in dry.splitlines() if "TOP=" in ln), None)
    for lib in ("lib64", "lib", "targets/x86_64-linux/lib"):
        if top and (Path(top) / lib / "libcudart_static.a").exists():
            return nvcc, Path(top) / lib
    raise RuntimeError(f"{nvcc} was found, but not libcudart_static.a of its toolkit")


class BuildKernels(build_ext):
    def build_extension(self, ext):
        record = {"version": self.distribution.get_version(), "python": platform.python_version()}
        native = switch("MMFAST_NATIVE")
        cuda = switch("MMFAST_CUDA")
        off = "MMFAST_NATIVE" if native is False else "MMFAST_CUDA"
        record["cuda"] = {"built": False, "reason": f"switched off by {off}=0"}
        record["native"] = {"built": False, "reason": "switched off by MMFAST_NATIVE=0"}
        if cuda and native is False:
            raise SystemExit("setup.py: MMFAST_CUDA=1 needs the native build, but MMFAST_NATIVE=0")
        if native is not False:
            if cuda is not False:
                record = self.attempt(record, "cuda", required=cuda)
            if not record["native"]["built"]:
                record = self.attempt(record, "native", required=native)
        path = Path(self.get_ext_fullpath(ext.name)).with_name("_build.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")

    def copy_extensions_to_source(self):
        """In-place and editable builds: the library, if there is one, and the build record."""
        built = Path(self.build_lib) / self.get_ext_filename("mmfast._C")
        for path in (built, built.with_name("_build.json")):
            if path.exists():
                shutil.copy2(path, ROOT / "mmfast" / path.name)

    def attempt(self, record, kind, required):
        """The record after one try at the build, with CUDA or without; a failure is recorded or raised."""
        try:
            how = None if kind == "native" else "emulate" if required == "emulate" else "nvcc"
            return self.compile(record, cuda=how)
        except (OSError, RuntimeError, subprocess.CalledProcessError, StopIteration, IndexError) as error:
            reason = str(error).strip().splitlines()[0]
            if required:
                raise SystemExit(
                    f"setup.py: MMFAST_{kind.upper()}=1, but the build failed: {error}"
                ) from error
            print(f"mmfast: no {kind} kernels: {reason}", file=sys.stderr)
            return record | {kind: {"built": False, "reason": reason}}

    def compile(self, record, cuda):
        """The record after compiling and linking everything; ``cuda``: None, "nvcc" or "emulate"."""
        import ninja
        import pybind11

        cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        if not cxx:
            raise RuntimeError("no C++ compiler: neither CXX, g++, clang++ nor c++ was found")
        sanitize = os.environ.get("MMFAST_SANITIZE", "")
        # Instrumented builds keep line numbers and let the optimiser alone.
        extra = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-g1", "-O1"] if sanitize else []
        record = dict(record)
        record["native"] = {
            "built": True,
            "compiler": first_line([cxx, "--version"]),
            "flags": " ".join(CXX_FLAGS + extra),
            "isas": list(ISAS),
        }

        build = NinjaFile(cxx)
        for source in CPU_SOURCES:
            for isa, flags in ISAS.items():
                defines = [f"-DMMFAST_ISA={isa}", f"-DMMFAST_NS=mmfast_{isa}"]
                build.compile("cxx", source, isa, CXX_FLAGS + flags + defines + extra)
        defines = [f"-DMMFAST_HAS_{isa.upper()}" for isa in ISAS]
        link_flags = ["-fopenmp", "-Wl,--gc-sections", "-s"] if not sanitize else ["-fopenmp", *extra]
        if cuda == "nvcc":
            nvcc, libraries = find_nvcc()
            archs = os.environ.get("MMFAST_CUDA_ARCHS", "80 90 100").split()
            *older, newest = archs
            gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in older]
            # PTX of the newest comes from the same run of the compiler as its machine code.
            gencode.append(f"'-gencode=arch=compute_{newest},code=[sm_{newest},compute_{newest}]'")
            build.lines.append(compile_rule("nvcc", nvcc))
            for source in CUDA_SOURCES:
                build.compile("nvcc", source, "cuda", NVCC_FLAGS + gencode)
            # The static runtime: the library loads on machines with no CUDA at all.
            link_flags += [f"-L{libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            defines.append("-DMMFAST_WITH_CUDA")
            version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
            release = next(ln for ln in version.splitlines() if "release" in ln).split("release ")[1]
            record["cuda"] = {"built": True, "nvcc": release, "archs": archs, "flags": " ".join(NVCC_FLAGS)}
        elif cuda == "emulate":
            for source in CUDA_SOURCES:
                build.compile(
                    "cxx", source, "emulated", [*CXX_FLAGS, "-Wno-unknown-pragmas", *extra, "-x c++"]
                )
            defines.append("-DMMFAST_WITH_CUDA")
            record["cuda"] = {"built": True, "emulated": True, "archs": []}
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        build.compile("cxx", Path("csrc/bindings.cpp"), "host", CXX_FLAGS + includes + defines + extra)

        target = Path(self.get_ext_fullpath("mmfast._C")).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(build.text(target, link_flags))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        print(
            f"mmfast: compiling {len(build.objects)} files{' with CUDA' if cuda else ''}",
            file=sys.stderr,
        )
        run = subprocess.run(
            [Path(ninja.BIN_DIR) / "ninja", *jobs],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if run.returncode:
            print(run.stdout, file=sys.stderr)
            cause = next(
                (ln for ln in run.stdout.splitlines() if "error" in ln.lower()), "see the output above"
            )
            raise RuntimeError(f"the compiler failed: {cause}")
        return record


setup(ext_modules=[Extension("mmfast._C", sources=[])], cmdclass={"build_ext": BuildKernels})
