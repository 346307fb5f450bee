"""The Barlow Twins loss among PyTorch's own operations: compilers, observers, autograd, autocast."""

import math

import pytest
import torch
from barlow_twins_help import DTYPES, FORMS, gradients, is_narrow, views
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import ALL_BACKENDS, BACKENDS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mmfast
from mmfast import functional as F
from mmfast.losses import BarlowTwinsLoss
from mmfast.ops.barlow_twins import op as ops
from mmfast.ops.barlow_twins.definition import Definition

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.rotation
@ALL_BACKENDS
@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, gram, backend):
    z_a, z_b = views(6, 9, dtype)
    narrow = is_narrow(dtype)
    for needs in ((True, True), (False, True), (False, False)):
        options = (gram, narrow, *needs, *Definition(lambd=0.01))
        arguments = (z_a, z_b, *options)
        torch.library.opcheck(torch.ops.mmfast.barlow_twins_forward, arguments)
        if any(needs):
            loss, _, hat, *saved = torch.ops.mmfast.barlow_twins_forward(*arguments)
            kept = [hat, z_a, z_b] if narrow else [hat] if dtype == hat.dtype else [z_a, z_b]
            torch.library.opcheck(
                torch.ops.mmfast.barlow_twins_backward,
                (torch.ones_like(loss), kept, *saved, *options),
            )


OPS = ["mmfast::barlow_twins_forward", "mmfast::barlow_twins_backward"]


class Listener(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.heard.append(op.name())
        return op(*args, **(kwargs or {}))


def test_whoever_observes_operations_sees_the_ops():
    """Nobody else pays for the dispatcher, and gets the same bits."""
    z_a, z_b = views(6, 40, torch.float32)
    expected = gradients(F.barlow_twins, z_a, z_b)
    with Listener() as listener:
        heard = gradients(F.barlow_twins, z_a, z_b)
    with torch.profiler.profile() as profile:
        seen = gradients(F.barlow_twins, z_a, z_b)
    names = [event.key for event in profile.key_averages()]
    assert all(name in listener.heard and name in names for name in OPS)
    for results in (heard, seen):
        assert all(map(torch.equal, results, expected))


def test_fake_tensors_are_not_computed_with():
    with FakeTensorMode() as mode:
        inside = torch.empty(6, 40, requires_grad=True)
        assert isinstance(F.barlow_twins(inside, inside), FakeTensor)
    fake = mode.from_tensor(torch.randn(6, 40).requires_grad_())
    loss = F.barlow_twins(fake, fake)
    loss.backward()
    assert isinstance(loss, FakeTensor) and isinstance(fake.grad, FakeTensor)
    meta = torch.empty(6, 40, device="meta", requires_grad=True)
    F.barlow_twins(meta, meta).backward()
    assert meta.grad.shape == meta.shape


def test_tensors_that_are_not_what_they_seem():
    z_a, z_b = views(6, 40, torch.float32)
    upstream = torch._efficientzerotensor(())
    z = z_a.clone().requires_grad_()
    loss = F.barlow_twins(torch._neg_view(-z_a), z_b)
    assert loss == F.barlow_twins(z_a, z_b) != F.barlow_twins(-z_a, z_b)
    (grad,) = torch.autograd.grad(F.barlow_twins(z, z_b), z, upstream)
    assert not grad.any()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_computes():
    first, second = (views(6, 40, torch.float32, seed) for seed in range(2))
    traced = torch.jit.trace(lambda x, y: F.barlow_twins(x, y), first, check_trace=False)
    assert all(map(torch.equal, gradients(traced, *second), gradients(F.barlow_twins, *second)))


@ALL_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compile_fullgraph_gives_the_same_bits(dtype, backend):
    torch.compiler.reset()
    loss = BarlowTwinsLoss(lambd=0.02)

    def train(z_a, z_b):
        return 2 * loss(z_a * 1.0, z_b)

    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    for shape in ((10, 40), (40, 10)):
        z_a, z_b = views(*shape, dtype)
        expected = gradients(train, z_a, z_b)
        parts = loss.last
        assert all(torch.equal(x, y) for x, y in zip(gradients(compiled, z_a, z_b), expected, strict=True))
        assert loss.last == parts
    if z_a.is_cuda:
        assert compiled(z_a * math.nan, z_b).isnan()
    else:
        with pytest.raises(mmfast.UserError, match="z_a must be finite"):
            compiled(z_a * math.nan, z_b)


def test_compile_with_inductor():
    z_a, z_b = views(10, 40, torch.float32)
    expected = gradients(F.barlow_twins, z_a, z_b)
    compiled = torch.compile(F.barlow_twins, fullgraph=True)
    torch.testing.assert_close(gradients(compiled, z_a, z_b), expected)


@ALL_BACKENDS
@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_cannot_demote(dtype, gram, backend):
    z_a, z_b = views(48, 40, dtype)
    expected = gradients(ops.barlow_twins, z_a, z_b, gram=gram)
    with torch.autocast(z_a.device.type, dtype=torch.bfloat16):
        inside = gradients(ops.barlow_twins, z_a, z_b, gram=gram)
    assert all(torch.equal(x, y) for x, y in zip(inside, expected, strict=True))


@pytest.mark.rotation
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@ALL_BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_for_backward(dtype, needs, backend):
    rows, columns = 24, 500
    z_a, z_b = (z.requires_grad_(need) for z, need in zip(views(rows, columns, dtype), needs, strict=True))
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.barlow_twins(z_a, z_b)
    inputs = (z_a.nbytes + z_b.nbytes) * (1 + is_narrow(dtype))
    small = (sum(needs) * rows**2 + 5 * columns) * loss.element_size()
    assert 0 < sum(storages.values()) <= inputs + small


def test_no_graph_without_need():
    z_a, z_b = views(8, 20)
    assert not F.barlow_twins(z_a, z_b).requires_grad
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert not F.barlow_twins(z_a.clone().requires_grad_(), z_b).requires_grad


@ALL_BACKENDS
@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_double_backward_is_refused(dtype, gram, backend):
    z_a, z_b = (z.requires_grad_() for z in views(6, 9, dtype))
    loss = ops.barlow_twins(z_a, z_b, gram=gram)[0]
    expected = torch.autograd.grad(loss, z_a, retain_graph=True)[0]
    (recorded,) = torch.autograd.grad(loss, z_a, create_graph=True)
    assert torch.equal(recorded, expected)
    # Also where the rest of the graph has an answer, and where autograd may skip what is unused.
    for penalty in (recorded.sum(), recorded.square().sum() + z_b.square().sum()):
        with pytest.raises(RuntimeError, match=r"barlow_twins: .*double backward"):
            torch.autograd.grad(penalty, z_b, retain_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match=r"barlow_twins: .*double backward"):
            penalty.backward(retain_graph=True)


@BACKENDS
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(2, 70),
    columns=st.integers(1, 140),
    lambd=st.floats(0, 2),
    eps=st.sampled_from([1e-5, 1e-2, 1.0]),
    center=st.booleans(),
    gram=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows, columns, lambd, eps, center, gram, seed, backend):
    z_a, z_b = views(rows, columns, seed=seed, noise=1.0)
    truth = gradients(ops.reference, z_a, z_b, lambd=lambd, center=center, eps=eps)
    ours = gradients(ops.barlow_twins, z_a, z_b, lambd=lambd, center=center, eps=eps, gram=gram)
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-11 * (1 + float(y.abs().max())))


class Twins(torch.nn.Module):
    def __init__(self, variant):
        super().__init__()
        self.layer, self.loss = torch.nn.Linear(6, 20), mmfast.BarlowTwinsLoss(variant=variant)

    def forward(self, a, b):
        return self.loss(self.layer(a), self.layer(b))


@pytest.mark.parametrize("variant", F.BARLOW_TWINS_VARIANTS)
@pytest.mark.filterwarnings("ignore:The tensor attribute self.loss._last was assigned during export")
def test_export(variant):
    """Values, for any number of rows of the form that is chosen; for pooled statistics that of the example."""
    module, x = Twins(variant), (torch.randn(9, 6), torch.randn(9, 6))
    rows = {} if variant == "vissl" else {0: torch.export.Dim("rows", min=2, max=14)}
    exported = torch.export.export(module, x, dynamic_shapes=(rows, rows))
    # Pooled statistics take the road of many views, in which no single op is all.
    ops_used = {str(node.target) for node in exported.graph.nodes}
    assert variant == "vissl" or "mmfast.barlow_twins_forward.default" in ops_used
    for batch in (x, [z[:5] for z in x] if rows else x):
        # What is exported holds the forward pass only.
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(*batch), module(*batch), rtol=1e-6, atol=0)
