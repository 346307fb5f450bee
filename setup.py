"""Builds ``mmfast._C``: torch-free kernels, one object per instruction set, plus CUDA where nvcc is found.

Environment
    MMFAST_NATIVE   unset: build the kernels if a C++ compiler works; 0: never; 1: fail if it does not work.
    MMFAST_CUDA     unset: build CUDA kernels if nvcc works; 0: never; 1: fail if it does not work; emulate: compile
                    them for the CPU, where CUDA's threads are fibers (csrc/cuda/emulation.h; tests only).
    MMFAST_CUDA_ARCHS   compute capabilities, such as "80 90a 120f"; default: those of "75 80 90 100 120" that nvcc
                    lists. PTX is added for the oldest, from which drivers make code for what has none.
    MMFAST_SANITIZE     for example "address,undefined": instrument the kernels (tests only).
    CXX, NVCC, MAX_JOBS as usual; CXX and NVCC may have arguments, as in "ccache g++".

What was built, and why something was not, is written to ``mmfast/_build.json`` (see ``mmfast info``).
"""

import json
import os
import platform
import re
import shlex
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
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-Xfatbin",
    "-compress-all",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
]
# The first of each generation whose machine code later members of it run, too: 80 serves 86 and 89, 100 serves 103.
CUDA_ARCHS = ("75", "80", "90", "100", "120")


def switch(name):
    """None (best effort), False (off) or True (must succeed)."""
    values = {"": None, "0": False, "1": True} | ({"emulate": "emulate"} if name == "MMFAST_CUDA" else {})
    value = os.environ.get(name, "")
    if value not in values:
        raise SystemExit(
            f"setup.py: {name} must be unset, {' or '.join(filter(None, values))}, got {value!r}"
        )
    return values[value]


class MissingTool(RuntimeError):
    """There is nothing to build with, as opposed to a build that fails."""


def output(command):
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout


def words(command):
    """A compiler as words of a command line: a path as it is, or a program with arguments."""
    program, *arguments = [command] if shutil.which(command) else shlex.split(command)
    return [os.path.abspath(program) if os.sep in program else program, *arguments]


class NinjaFile:
    """The few lines of ninja syntax this build needs, run in ``folder``.

    Ninja and nvcc each have characters that they cannot be told of in paths, and which ones depends on their
    version. So all names in the file are relative to the folder, where links lead to what lies elsewhere.
    """

    def __init__(self, folder, cxx):
        self.folder, self.lines, self.objects = folder, [], []
        folder.mkdir(parents=True, exist_ok=True)
        self.rule("cxx", cxx)
        self.lines.append(f"rule link\n  command = {self.quoted(cxx)} -shared $in -o $out $flags")

    @staticmethod
    def quoted(command):
        """Words for the shell, in a value of ninja."""
        return shlex.join(command).replace("$", "$$")

    def rule(self, name, compiler):
        self.lines.append(
            f"rule {name}\n  command = {self.quoted(compiler)} -MMD -MF $out.d $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc"
        )

    def link(self, name, path):
        """``name``, which the file can use for ``path``."""
        at = self.folder / name
        at.unlink(missing_ok=True)
        at.symlink_to(Path(path).resolve(), target_is_directory=True)
        return name

    def compile(self, rule, source, tag, flags):
        target = f"{Path(source).stem}.{tag}.o"
        self.lines.append(f"build {target}: {rule} {source}\n  flags = {self.quoted(flags)}")
        self.objects.append(target)

    def run(self, target, link_flags):
        """Builds ``target`` of all objects; raises with what the compiler says."""
        import ninja

        link = f"build {target}: link {' '.join(self.objects)}\n  flags = {self.quoted(link_flags)}"
        (self.folder / "build.ninja").write_text("\n".join([*self.lines, link, f"default {target}", ""]))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        done = subprocess.run(
            [Path(ninja.BIN_DIR) / "ninja", *jobs],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            lines = [line for line in done.stdout.splitlines() if "error" in line.lower() or "fatal" in line]
            raise RuntimeError(f"the compiler failed: {lines[0] if lines else 'see the output above'}")
        return self.folder / target


def find_nvcc():
    """(nvcc as a command, its toolkit's library folder) or raises with the reason."""
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME")
    if not nvcc and home and (Path(home) / "bin/nvcc").exists():
        nvcc = str(Path(home) / "bin/nvcc")
    if not nvcc:
        raise MissingTool("nvcc was not found on PATH, in NVCC or in CUDA_HOME")
    nvcc = words(nvcc)
    # nvcc may be a wrapper script, so its own dry run is what knows where the toolkit is.
    dry = subprocess.run(
        [*nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, errors="replace"
    ).stderr
    top = next((ln.split("TOP=")[1].strip() for ln in dry.splitlines() if "TOP=" in ln), None)
    for lib in ("lib64", "lib", "targets/x86_64-linux/lib"):
        if top and (Path(top) / lib / "libcudart_static.a").exists():
            return nvcc, Path(top) / lib
    raise RuntimeError(f"{shlex.join(nvcc)} was found, but not libcudart_static.a of its toolkit")


def cuda_archs(nvcc):
    """Architectures to compile for, from old to new: digits, with an ``a`` or ``f`` where asked for."""
    listed = set(re.findall(r"\bsm_(\d+)", output([*nvcc, "--list-gpu-code"])))
    asked = os.environ.get("MMFAST_CUDA_ARCHS", "").split()
    for arch in asked:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise SystemExit(
                f"setup.py: MMFAST_CUDA_ARCHS must hold compute capabilities such as 80 90a 120f, got {arch!r}"
            )
    archs = asked or [arch for arch in CUDA_ARCHS if arch in listed]
    unknown = [arch for arch in asked if arch.rstrip("af") not in listed]
    if unknown or not archs:
        known, wanted = " ".join(sorted(listed, key=int)), " ".join(unknown or CUDA_ARCHS)
        raise RuntimeError(f"{shlex.join(nvcc)} compiles for {known}, not for {wanted}")
    return sorted(set(archs), key=lambda arch: (int(arch.rstrip("af")), arch))


def gencode(archs):
    """Machine code for each architecture, and PTX of the oldest that may serve others."""
    general = [arch for arch in archs if arch.isdigit()]
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs if a not in general[:1]]
    # PTX comes from the same run of the compiler as the machine code of its architecture.
    return flags + [f"-gencode=arch=compute_{a},code=[sm_{a},compute_{a}]" for a in general[:1]]


def without(kind, reason, failed=False):
    """The record of kernels that were not built; ``failed``: though there was something to build them with."""
    return {kind: {"built": False, "reason": reason, "failed": failed}}


class BuildKernels(build_ext):
    def build_extension(self, ext):
        record = {"version": self.distribution.get_version(), "python": platform.python_version()}
        native = switch("MMFAST_NATIVE")
        cuda = switch("MMFAST_CUDA")
        off = "MMFAST_NATIVE" if native is False else "MMFAST_CUDA"
        record |= without("cuda", f"switched off by {off}=0")
        record |= without("native", "switched off by MMFAST_NATIVE=0")
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
        self.tell(record, native)

    @staticmethod
    def tell(record, native):
        """The last words of a build that has less than was asked for; pip shows them with -v only."""
        if native is not False and not record["native"]["built"]:
            loss = "Everything will run in plain PyTorch, several times slower."
        elif record["cuda"].get("failed"):
            loss = "CUDA tensors will be served by Triton or plain PyTorch."
        else:
            return
        kind = "cuda" if record["native"]["built"] else "native"
        line = "!" * 100
        print(
            f"{line}\nmmfast: THE {kind.upper()} KERNELS WERE NOT BUILT: {record[kind]['reason']}\n{loss}\n"
            f"MMFAST_{kind.upper()}=1 makes this an error, MMFAST_{kind.upper()}=0 leaves them out.\n{line}",
            file=sys.stderr,
        )

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
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if required:
                raise SystemExit(
                    f"setup.py: MMFAST_{kind.upper()}=1, but the build failed: {error}"
                ) from error
            print(f"mmfast: no {kind} kernels: {reason}", file=sys.stderr)
            return record | without(kind, reason, failed=not isinstance(error, MissingTool))

    def compile(self, record, cuda):
        """The record after compiling and linking everything; ``cuda``: None, "nvcc" or "emulate"."""
        import pybind11

        cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        if not cxx:
            raise MissingTool("no C++ compiler: neither CXX, g++, clang++ nor c++ was found")
        cxx = words(cxx)
        sanitize = os.environ.get("MMFAST_SANITIZE", "")
        # Instrumented builds keep line numbers and let the optimiser alone.
        extra = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-g1", "-O1"] if sanitize else []
        record = dict(record)
        record["native"] = {
            "built": True,
            "compiler": output([*cxx, "--version"]).splitlines()[0],
            "flags": " ".join(CXX_FLAGS + extra),
            "isas": list(ISAS),
        }

        build = NinjaFile(Path(self.build_temp).resolve(), cxx)
        build.link("csrc", ROOT / "csrc")
        for source in CPU_SOURCES:
            for isa, flags in ISAS.items():
                defines = [f"-DMMFAST_ISA={isa}", f"-DMMFAST_NS=mmfast_{isa}"]
                build.compile("cxx", source, isa, CXX_FLAGS + flags + defines + extra)
        defines = [f"-DMMFAST_HAS_{isa.upper()}" for isa in ISAS]
        link_flags = ["-fopenmp", "-Wl,--gc-sections", "-s"] if not sanitize else ["-fopenmp", *extra]
        if cuda == "nvcc":
            nvcc, libraries = find_nvcc()
            archs = cuda_archs(nvcc)
            build.rule("nvcc", nvcc)
            for source in CUDA_SOURCES:
                build.compile("nvcc", source, "cuda", NVCC_FLAGS + gencode(archs))
            # The static runtime: the library loads on machines with no CUDA at all.
            link_flags += [f"-L{build.link('cudart', libraries)}"]
            link_flags += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            defines.append("-DMMFAST_WITH_CUDA")
            version = output([*nvcc, "--version"])
            release = next(ln for ln in version.splitlines() if "release" in ln).split("release ")[1]
            record["cuda"] = {"built": True, "nvcc": release, "archs": archs, "flags": " ".join(NVCC_FLAGS)}
        elif cuda == "emulate":
            for source in CUDA_SOURCES:
                build.compile(
                    "cxx", source, "emulated", [*CXX_FLAGS, "-Wno-unknown-pragmas", *extra, "-x", "c++"]
                )
            defines.append("-DMMFAST_WITH_CUDA")
            record["cuda"] = {"built": True, "emulated": True, "archs": []}
        includes = {"pybind11": pybind11.get_include(), "python": sysconfig.get_paths()["include"]}
        includes = [f"-I{build.link(f'include_{name}', path)}" for name, path in includes.items()]
        build.compile("cxx", Path("csrc/bindings.cpp"), "host", CXX_FLAGS + includes + defines + extra)

        print(
            f"mmfast: compiling {len(build.objects)} files{' with CUDA' if cuda else ''}",
            file=sys.stderr,
        )
        built = build.run("_C.so", link_flags)
        target = Path(self.get_ext_fullpath("mmfast._C"))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)
        return record


if __name__ == "__main__":
    setup(ext_modules=[Extension("mmfast._C", sources=[])], cmdclass={"build_ext": BuildKernels})
