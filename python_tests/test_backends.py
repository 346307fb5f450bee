"""Choice of backend, the build record, and what importing the package costs."""

import contextlib
import functools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mmfast
from mmfast import backends
from mmfast.ops.native import call_cuda

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def python(code, **env):
    """Standard output of ``code`` in a fresh interpreter."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def available(monkeypatch, *names):
    """Backends as on a machine where these serve CUDA tensors."""
    for name in ("cuda", "triton"):
        reason = "" if name in names else f"no {name} here"
        monkeypatch.setitem(backends._WHY_NOT, name, lambda device, reason=reason: reason)


@pytest.mark.parametrize(
    "names, chosen", [(["cuda", "triton"], "cuda"), (["triton"], "triton"), ([], "reference")], ids=str
)
def test_the_fastest_available_backend_serves_each_device(native, monkeypatch, names, chosen):
    available(monkeypatch, *names)
    assert backends.choose("augment_apply", CUDA) == chosen
    assert backends.choose("augment_apply", CPU) == "cpu"


@pytest.mark.parametrize(
    "name, device, reason", [("cpu", CUDA, "its kernels take CPU tensors, not cuda ones")]
)
def test_a_backend_can_be_forced_and_is_given_back(native, name, device, reason):
    with mmfast.backend("reference"):
        assert backends.choose("augment_apply", CPU) == "reference"
        with (
            pytest.raises(
                mmfast.UserError, match=f"augment_apply: the {name} backend was asked for, but {reason}"
            ),
            mmfast.backend(name),
        ):
            backends.choose("augment_apply", device)
        assert backends.choose("augment_apply", CPU) == "reference"


@pytest.mark.parametrize(
    "archs, runs, fails",
    [
        ("75 80 90 100 120", "75 80 86 87 89 90 100 103 110 120 121 130", "70"),
        ("100", "100 103 110 120", "90"),
        ("86", "86 89 90", "80"),
        ("90a", "90", "80 91 100 120"),
        ("80 90a", "80 89 90 100", "75"),
        ("90a 100f 120f", "90 100 103 120 121", "80 89 91 110 130"),
        ("103f", "103", "100 110"),
    ],
)
def test_a_device_needs_code_that_it_can_run(monkeypatch, archs, runs, fails):
    monkeypatch.setattr(backends, "build_record", lambda: {"cuda": {"archs": archs.split()}})
    assert not any(backends._no_code_for(int(device)) for device in runs.split())
    for device in fails.split():
        assert backends._no_code_for(int(device)).endswith(f"this device is sm_{device}")


def test_ptx_needs_a_driver_that_can_compile_it(monkeypatch):
    monkeypatch.setattr(backends, "build_record", lambda: {"cuda": {"archs": ["80", "90"]}})
    assert not backends._no_code_for(89, ptx=False) and not backends._no_code_for(90, ptx=False)
    assert "its PTX is too new for the driver" in backends._no_code_for(100, ptx=False)


class Library:
    """``mmfast._C`` on a machine with these devices; it counts how often it is asked in this process."""

    def __init__(self, capabilities=(), driver=13000, error=0):
        self.capabilities, self.driver, self.error, self.asked = capabilities, driver, error, 0

    def cuda_device_count(self):
        self.asked += 1
        return -self.error if self.error else len(self.capabilities)

    def cuda_capability(self, index):
        return self.capabilities[index]

    def cuda_runtime_version(self):
        return 13000

    def cuda_driver_version(self):
        return self.driver

    def cuda_error_string(self, code):
        return f"the text of {code}"

    def isas(self):
        return ["generic"]


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this look like a machine with a GPU, PyTorch for it, and that library."""
    caches = backends._cuda_runtime, backends._no_code_on

    def make(library, initialised=True):
        monkeypatch.setattr(backends, "_C", library)
        monkeypatch.setattr(
            backends, "build_record", lambda: {"cuda": {"archs": ["80", "90"]}, "native": {"built": True}}
        )
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(backends, "_why_not_triton", lambda device: "")
        monkeypatch.setitem(backends._WHY_NOT, "triton", lambda device: "")
        return library

    for cache in caches:
        cache.cache_clear()
    yield make
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    "library, reason",
    [
        (
            Library(error=35, driver=12040),
            "runtime 13.0 cannot use device 0 with a driver for CUDA 12.4: the text of 35",
        ),
        (Library(error=100, driver=0), "cannot use device 0 with a driver for CUDA 0.0: the text of 100"),
        (Library(), "cannot use device 0 with a driver for CUDA 13.0: it finds 0 devices"),
        (Library([100], driver=12090), "its PTX is too new for the driver, and this device is sm_100"),
        (Library([75]), "its kernels were built for sm_80, sm_90, and this device is sm_75"),
    ],
    ids=["old driver", "no driver", "no devices", "new device", "old device"],
)
def test_triton_serves_where_the_linked_runtime_cannot(machine, library, reason):
    machine(library)
    for _ in range(3):
        assert backends.choose("augment_apply", CUDA) == "triton"
        assert backends.choose("barlow_twins", torch.device("cuda", 0)) == "triton"
    assert library.asked == 1
    with (
        pytest.raises(mmfast.UserError, match=f"cuda backend was asked for, but .*{reason}"),
        mmfast.backend("cuda"),
    ):
        backends.choose("augment_apply", CUDA)


def test_cuda_kernels_serve_the_devices_they_find(machine):
    machine(Library([90, 89]))
    assert [backends.choose("augment_apply", torch.device("cuda", i)) for i in range(3)] == [
        "cuda",
        "cuda",
        "triton",
    ]


@pytest.mark.parametrize("initialised", [False, True])
def test_asking_initialises_no_cuda(machine, monkeypatch, initialised):
    """cudaGetDeviceCount would, and a process that is forked after it could not use the GPU."""
    library = machine(Library([90]), initialised)
    elsewhere = {"devices": 1, "capabilities": [90], "runtime": 13000, "driver": 13000}
    monkeypatch.setattr(backends.cuda_runtime, "facts_from_elsewhere", lambda _: elsewhere)
    for name in ("is_available", "init", "_lazy_init", "get_device_capability", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("CUDA was initialised"))
    if not initialised:
        monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("CUDA was initialised"))
    facts = mmfast.info()
    assert facts["cuda"]["devices"] == ["sm_90"] and facts["cuda"]["driver"] == "13.0"
    assert facts["ops"]["barlow_twins (cuda)"]["uses"] == "cuda"
    assert library.asked == initialised


@pytest.mark.skipif(not hasattr(backends._C, "cuda_capability"), reason="no CUDA kernels were built")
def test_another_process_finds_what_this_one_finds():
    """Run without mmfast and torch, on the library alone."""
    assert backends.cuda_runtime.facts_from_elsewhere(backends._C) == backends.cuda_runtime.facts(backends._C)


def test_forcing_a_gpu_backend_on_cpu_tensors_says_what_it_needs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for name, reason in [
        ("cuda", "no CUDA kernels|its kernels take CUDA"),
        ("triton", "CUDA tensors|not installed"),
    ]:
        if backends.why_not(name, CPU):
            with (
                pytest.raises(mmfast.UserError, match=f"the {name} backend was asked for, but .*({reason})"),
                mmfast.backend(name),
            ):
                mmfast.SeqAug(p=1)(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_an_op_without_kernels_of_a_backend_is_not_served_by_another(monkeypatch, name):
    available(monkeypatch, "cuda", "triton")
    z, labels = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    calls = {
        "triplets": lambda: mmfast.TripletMarginLoss()(z, labels),
        "pkt": lambda: mmfast.PKTLoss()({"a": z, "b": z}),
        "vicreg": lambda: mmfast.VICRegLoss()(z, z),
    }
    calls["triplets "] = lambda: mmfast.SmoothTripletLoss()(z, labels)
    for op, call in calls.items():
        assert backends.choose(op.strip(), CUDA) == "reference"
        wanted = f"{op.strip()}: the {name} backend was asked for, but {op.strip()} has no {name} kernels"
        with mmfast.backend(name), pytest.raises(mmfast.UserError, match=wanted):
            call()
        with mmfast.backend("reference"):
            assert call().isfinite()
    with mmfast.backend(name):
        assert mmfast.info()["ops"]["pkt (cpu)"]["uses"].startswith(f"none (pkt: the {name} backend")


@pytest.mark.skipif(
    not hasattr(backends._C, "cuda_capability") or backends.emulated() or torch.cuda.is_available(),
    reason="CUDA kernels and no GPU to run them on: not the case here",
)
def test_cuda_kernels_load_without_a_gpu_and_fail_with_a_reason():
    facts = mmfast.info()["cuda"]
    assert facts["archs"] and "augment_apply" in facts["kernels"]
    assert isinstance(facts["devices"], str) or facts["devices"] == 0
    assert float(facts["runtime"]) > 11 and (facts["driver"] == "none" or float(facts["driver"]) > 0)
    arguments = backends._C.AugmentArguments(1, [1], [0, 0, 0, 0, 0], [0.5, 0.0], [3, 4, 0, 0], 0, 0, 6)
    with pytest.raises(RuntimeError, match=r"augment_draw: CUDA error \d+: .*(driver|device)"):
        call_cuda("augment_draw", backends._C.cuda_augment_draw, CPU, arguments, 0)


def test_blocks_of_overlapping_threads_each_take_back_only_themselves(native):
    """Entered as A, B, left as A, B: what B found when it came is not what is right when it goes."""
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    used = functools.partial(backends.choose, "augment_apply", CPU)
    before = used()
    with ThreadPoolExecutor(1) as pool:
        first.enter_context(mmfast.backend("reference"))
        pool.submit(second.enter_context, mmfast.backend("cpu")).result()
        assert used() == pool.submit(used).result() == "cpu"
        first.close()
        assert used() == pool.submit(used).result() == "cpu"
        pool.submit(second.close).result()
        assert used() == pool.submit(used).result() == before


def test_a_forced_backend_holds_on_other_threads(native):
    """Backward passes on GPUs run on threads that autograd makes."""
    with ThreadPoolExecutor(1) as pool, mmfast.backend("reference"):
        assert pool.submit(backends.choose, "augment_apply", CPU).result() == "reference"


def test_environment_variable_forces_a_backend():
    code = "import torch; from mmfast import backends; print(backends.choose('augment_apply', torch.device('cpu')))"
    assert python(code, MMFAST_BACKEND="reference") == "reference"


@pytest.mark.parametrize("name", ["native", "", "Triton"])
def test_unknown_backends_are_named(name, monkeypatch):
    with (
        pytest.raises(
            mmfast.UserError,
            match=f"backend: the backend must be one of cpu, cuda, triton, reference, got '{name}'",
        ),
        mmfast.backend(name),
    ):
        pass
    if name:
        monkeypatch.setenv("MMFAST_BACKEND", name)
        with pytest.raises(
            mmfast.UserError, match=f"MMFAST_BACKEND: the backend must be one of .* got '{name}'"
        ):
            backends.choose("augment_apply", CPU)


def test_without_kernels_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(
        backends, "build_record", lambda: {"native": {"built": False, "reason": "no C++ compiler"}}
    )
    assert backends.why_not("cpu", CPU) == "no C++ kernels: no C++ compiler"
    row = mmfast.info()["ops"]["augment_apply (cpu)"]
    assert row["uses"] == "reference" and row["reference"] == "available"
    assert row["cpu"] == "no C++ kernels: no C++ compiler"
    assert row["cuda"] == "no CUDA kernels: no C++ compiler"
    assert "uses: reference" in backends.info_text()


FAILED = {"built": False, "reason": "the compiler failed: error: x", "failed": True}


@pytest.mark.parametrize(
    "native, cuda, told",
    [
        (
            FAILED,
            FAILED,
            r"no C\+\+ kernels \(the compiler failed: error: x\).*plain PyTorch.*MMFAST_NATIVE=1",
        ),
        (
            {"built": False, "reason": "no C++ compiler", "failed": False},
            {},
            r"no C\+\+ kernels \(no C\+\+ compiler\)",
        ),
        (None, {}, r"no C\+\+ kernels \(the package was not built\)"),
        (
            {"built": True},
            FAILED,
            r"no CUDA kernels, though nvcc was there \(the compiler failed.*MMFAST_CUDA=1",
        ),
        ({"built": False, "reason": "switched off by MMFAST_NATIVE=0", "failed": False}, {}, None),
        ({"built": True}, {"built": False, "reason": "nvcc was not found", "failed": False}, None),
    ],
    ids=["compiler failed", "no compiler", "not built", "nvcc failed", "switched off", "no nvcc"],
)
def test_missing_kernels_are_told(monkeypatch, native, cuda, told):
    monkeypatch.setattr(backends, "_C", object() if native and native["built"] else None)
    monkeypatch.setattr(backends, "build_record", lambda: {"native": native, "cuda": cuda} if native else {})
    sentence = backends._missing_kernels()
    assert re.search(told, sentence) if told else sentence == ""


def test_importing_warns_of_missing_kernels():
    """pip hides what a build that went through has printed."""
    code = (
        "import sys, warnings; sys.modules['mmfast._C'] = None; warnings.simplefilter('error'); "
        "from mmfast import SeqAug"
    )
    with pytest.raises(
        AssertionError, match=r"RuntimeWarning: mmfast has no C\+\+ kernels \(.*plain PyTorch"
    ):
        python(code)


def test_info_begins_with_what_is_missing(monkeypatch):
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "build_record", lambda: {"native": FAILED, "cuda": FAILED})
    assert backends.info_text().startswith(
        "warning: mmfast has no C++ kernels (the compiler failed: error: x)"
    )


def test_info_tells_versions_build_and_backends(native):
    facts = mmfast.info()
    assert facts["mmfast"] == mmfast.__version__
    assert facts["torch"] == torch.__version__
    assert facts["native"]["built"] and facts["native"]["compiler"]
    assert facts["instruction sets"] == native.isas()
    used = {name: row["uses"] for name, row in facts["ops"].items() if name.endswith("(cpu)")}
    assert used.pop("pkt (cpu)") == used.pop("vicreg (cpu)") == "reference"
    assert set(used.values()) == {"cpu"} and "triplets (cpu)" in used
    assert facts["ops"]["triplets (cpu)"]["triton"] == "triplets has no triton kernels (only cpu, reference)"
    assert facts["cuda"]["built"] or facts["cuda"]["reason"]


def test_instruction_sets_can_be_switched(native):
    names = native.isas()
    assert names[0] == "generic"
    before = native.use_isa("generic")
    assert before == names[-1]
    assert native.use_isa(before) == "generic"
    with pytest.raises(ValueError, match=r"use_isa: name must be one of isas\(\), got 'mmx'"):
        native.use_isa("mmx")


def test_import_is_light_and_touches_no_gpu():
    code = (
        "import sys, torch, time; before = set(sys.modules); start = time.perf_counter(); import mmfast; "
        "took = time.perf_counter() - start; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(took < 0.5, torch.cuda.is_initialized(), "
        "new & {'lightning', 'torchmetrics', 'jsonargparse', 'h5py', 'matplotlib', 'rich', 'sklearn', 'triton'})"
    )
    assert python(code) == "True False set()"
