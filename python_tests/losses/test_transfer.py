"""Probabilistic knowledge transfer: published numbers, the reference, gradients, strips."""

import itertools

import pytest
import torch

from mmfast.losses.transfer import DirectedPKTLoss, PKTLoss, directed_pkt, pkt
from mmfast.ops.similarity import pkt as ops
from mmfast.ops.similarity.pkt_reference import conditional, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("t", "v", "a")
ALL = list(itertools.permutations(NAMES, 2))
OPTIONS = [
    {"exclude_self": exclude, "scale": scale, "teacher_grad": teacher}
    for exclude in (False, True)
    for scale in ("entry_mean", "row_sum")
    for teacher in (True, False)
]


def sample(dtype=torch.float64):
    """The embeddings and confidences of the worked example, in which a larger confidence is the student's."""
    h = {
        "t": [[1, 2, 0], [0, 1, 1], [2, 1, 0], [1, 0, 3]],
        "v": [[1, 0], [1, 1], [0, 1], [2, 1]],
        "a": [[3, 1], [1, 2], [1, -1], [2, 2]],
    }
    w = {"t": [0.9, 0.2, 0.5, 0.4], "v": [0.6, 0.7, 0.5, 0.1], "a": [0.3, 0.8, 0.6, 0.4]}
    h, w = ({name: torch.tensor(x, dtype=dtype) for name, x in values.items()} for values in (h, w))
    return {name: x.requires_grad_() for name, x in h.items()}, w


def random_views(rows, columns=(3, 5, 2), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for d in columns)
    return {name: x.to(dtype).requires_grad_() for name, x in zip(NAMES, made, strict=True)}


def random_weights(rows, pairs=ALL, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {pair: torch.rand(rows, generator=generator, dtype=torch.float64) for pair in pairs}


def evaluate(function, views, *arguments, upstream=1.0, **options):
    """The loss and its gradients; 0 for what it does not depend on."""
    loss = function(views, *arguments, **options)
    leaves = [x for x in views.values() if x.requires_grad]
    grads = torch.autograd.grad(loss * upstream, leaves, allow_unused=True)
    return loss.detach(), [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
    ]


def close(got, expected, rel, least=0.0):
    for x, y in zip(got, expected, strict=True):
        x, y = x.double(), y.double()
        assert (x - y).norm() <= rel * y.norm() + least


# Published numbers.


@pytest.mark.parametrize(
    "student, teacher, value",
    [
        ("t", "v", 0.0081416085),
        ("t", "a", 0.0074861121),
        ("v", "t", 0.0085166263),
        ("v", "a", 0.0101714144),
        ("a", "t", 0.0077399933),
        ("a", "v", 0.0113064280),
    ],
)
def test_golden_pairs(student, teacher, value):
    h, _ = sample()
    h = {name: x.detach() for name, x in h.items()}
    assert float(pkt(h, pairs=[(teacher, student)])) == pytest.approx(value, abs=6e-11)
    assert float(reference(h, pairs=[(teacher, student)])) == pytest.approx(value, abs=6e-11)


def test_golden_sums():
    h, w = sample()
    h = {name: x.detach() for name, x in h.items()}
    assert float(pkt(h)) == pytest.approx(0.0533621826, abs=6e-11)
    assert float(pkt(h, scale="row_sum")) == pytest.approx(0.2134487303, abs=6e-11)
    assert float(pkt(h, exclude_self=True)) == pytest.approx(0.070383, abs=6e-7)
    assert float(directed_pkt(h, w)) == pytest.approx(0.0163334021, abs=6e-11)
    assert float(directed_pkt(h, w, level="batch")) == pytest.approx(0.0151434100, abs=6e-11)
    assert float(directed_pkt(h, w, preset="released")) == pytest.approx(0.0151434100, abs=6e-11)
    row = torch.tensor([0.30295989, 0.25859244, 0.15147995, 0.28696773], dtype=torch.float64)
    torch.testing.assert_close(conditional(h["v"])[0], row, rtol=0, atol=6e-9)


def test_golden_weights():
    """s * w of each row, student first."""
    h, w = sample()
    given = {
        ("t", "v"): [0.9, 0, 0, 0.4],
        ("t", "a"): [0.9, 0, 0, 0],
        ("v", "t"): [0, 0.7, 0, 0],
        ("v", "a"): [0.6, 0, 0, 0],
        ("a", "t"): [0, 0.8, 0.6, 0],
        ("a", "v"): [0, 0.8, 0.6, 0.4],
    }
    weights = {(t, s): torch.tensor(g, dtype=torch.float64) for (s, t), g in given.items()}
    for teacher_grad in (True, False):
        expected = evaluate(pkt, h, weights, teacher_grad=teacher_grad)
        got = evaluate(directed_pkt, h, w, teacher_grad=teacher_grad)
        close([got[0], *got[1]], [expected[0], *expected[1]], 1e-14)


@pytest.mark.parametrize(
    "teacher_grad, norms",
    [(True, (0.008338, 0.012664, 0.022260)), (False, (0.006449, 0.002378, 0.021608)), (None, None)],
)
def test_golden_gradient_norms(teacher_grad, norms):
    h, w = sample()
    _, grads = evaluate(directed_pkt, h, w, teacher_grad=teacher_grad)
    norms = norms or (0.006449, 0.002378, 0.021608)
    assert [float(g.norm()) for g in grads] == pytest.approx(norms, abs=6e-7)


def test_presets_and_orientation():
    h, w = sample()
    same = evaluate(directed_pkt, h, w, level="batch", teacher_grad=True)
    released = evaluate(directed_pkt, h, w, preset="released")
    close([released[0], *released[1]], [same[0], *same[1]], 0)
    # The modality of the larger confidence teaches.
    weights = {(m, n): torch.where(w[m] > w[n], w[m], 0) for m, n in ALL}
    expected = evaluate(reference, h, weights, teacher_grad=False)
    got = evaluate(directed_pkt, h, w, orientation="teacher")
    close([got[0], *got[1]], [expected[0], *expected[1]], 1e-12)
    module = DirectedPKTLoss(preset="released", orientation="teacher")
    assert float(module(h, w)) == float(directed_pkt(h, w, preset="released", orientation="teacher"))
    assert "level='batch'" in repr(module) and module.teacher_grad is True
    assert float(PKTLoss([("t", "a")], scale="row_sum")(h)) == float(
        pkt(h, pairs=[("t", "a")], scale="row_sum")
    )


# The reference.


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options, monkeypatch):
    monkeypatch.setattr(ops, "STRIP", 12)
    views = random_views(6)
    pairs = [("t", "v"), ("a", "v"), ("v", "a")]
    weights = random_weights(6, pairs)
    if not options["teacher_grad"]:
        # By differences nothing is detached: of the students' gradient only where no teacher is one.
        pairs, weights = [("t", "v"), ("a", "v")], random_weights(6, [("t", "v"), ("a", "v")])
        fixed = {name: views[name].detach() for name in ("t", "a")}
        call = lambda v: pkt({**fixed, "v": v}, weights, pairs=pairs, **options)  # noqa: E731
        assert torch.autograd.gradcheck(call, [views["v"]], eps=1e-6, atol=1e-9, rtol=1e-6)
        return
    call = lambda *h: pkt(dict(zip(NAMES, h, strict=True)), weights, pairs=pairs, **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, list(views.values()), eps=1e-6, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("strip", [1, 100, 2**18])
@pytest.mark.parametrize("columns", [(1, 3, 128), (128, 1, 1), (3, 3, 3), (128, 3, 5)], ids=str)
@pytest.mark.parametrize("rows", [2, 3, 17, 65])
def test_reference_in_fp64(rows, columns, strip, monkeypatch):
    monkeypatch.setattr(ops, "STRIP", strip)
    views = random_views(rows, columns)
    for options in OPTIONS:
        # With one neighbour, which has all of P, the gradient is 0 in theory.
        least = 1e-6 if rows == 2 and options["exclude_self"] else 1e-15
        for weights in (None, random_weights(rows)):
            expected = evaluate(reference, views, weights, upstream=-2.5, **options)
            got = evaluate(pkt, views, weights, upstream=-2.5, **options)
            # Opposite rows of one column have K = eps: what rounding leaves of it is not 1e-10.
            loose = 1e-5 if 1 in columns else 1e-10
            assert float(got[0]) == pytest.approx(float(expected[0]), rel=min(loose, 1e-7), abs=1e-15)
            close(got[1], expected[1], loose, least)


@pytest.mark.parametrize("options", OPTIONS[::3], ids=str)
@pytest.mark.parametrize("rows, columns", [(3, (3, 5, 2)), (17, (3, 128, 5)), (65, (128, 64, 30))], ids=str)
def test_single_precision_is_no_worse_than_the_reference(rows, columns, options, monkeypatch):
    monkeypatch.setattr(ops, "STRIP", 300)
    views = random_views(rows, columns, torch.float32)
    weights = random_weights(rows)
    exact = {name: x.detach().double().requires_grad_() for name, x in views.items()}
    expected = evaluate(reference, exact, weights, **options)
    theirs = evaluate(reference, views, weights, **options)
    got = evaluate(pkt, views, weights, **options)
    assert got[0].dtype == torch.float32 and all(g.dtype == torch.float32 for g in got[1])
    assert float(got[0]) == pytest.approx(float(expected[0]), rel=2e-6)
    for x, y, z in zip(got[1], expected[1], theirs[1], strict=True):
        error = float((z.double() - y).norm() / y.norm())
        assert (x.double() - y).norm() <= max(2e-6, 1.5 * error) * y.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-3), (torch.float16, 1e-3)], ids=str)
def test_half_types_are_computed_in_single_precision(dtype, tolerance):
    views = random_views(33, (40, 20, 30), dtype)
    exact = {name: x.detach().double().requires_grad_() for name, x in views.items()}
    # Gradients of this size are no subnormal numbers of fp16.
    expected = evaluate(reference, exact, upstream=1e4)
    got = evaluate(pkt, views, upstream=1e4)
    assert got[0].dtype == torch.float32 and all(g.dtype == dtype for g in got[1])
    assert float(got[0]) == pytest.approx(float(expected[0]), rel=2e-6)
    close(got[1], expected[1], tolerance)


def test_nearly_equal_views_do_not_cancel():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    noise = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    views = {"t": x.float().requires_grad_(), "v": (x * (1 + 0.01 * noise)).float().requires_grad_()}
    exact = {name: h.detach().double().requires_grad_() for name, h in views.items()}
    expected, grads = evaluate(reference, exact)
    got, ours = evaluate(pkt, views)
    assert float(got) == pytest.approx(float(expected), rel=1e-5)
    close(ours, grads, 1e-4)


# Identities.


def test_equal_views_have_nothing_to_transfer():
    x = random_views(9)["t"].detach()
    for dtype in (torch.float32, torch.float64):
        views = {"t": x.to(dtype).requires_grad_(), "v": x.to(dtype).requires_grad_()}
        loss, grads = evaluate(pkt, views)
        # r is 0, and q is -eps / (P + eps).
        assert float(loss) == 0 and all(float(g.abs().max()) < 1e-7 for g in grads)


def test_swapped_modalities_are_swapped_pairs():
    h, w = random_views(17, (4, 4, 4)), random_weights(17)
    swapped = {"t": h["v"], "v": h["t"], "a": h["a"]}
    other = {"t": "v", "v": "t", "a": "a"}
    pairs = [("t", "v"), ("a", "t")]
    again = {(other[t], other[s]): w[t, s] for t, s in pairs}
    weights = {pair: w[pair] for pair in pairs}
    a = pkt(h, weights, pairs=pairs)
    b = pkt(swapped, again, pairs=[(other[t], other[s]) for t, s in pairs])
    assert float(a) == pytest.approx(float(b), rel=1e-14)


def test_scales_of_rows_and_whole_batches():
    h = random_views(17)
    grown = {name: x.detach() * 1e3 for name, x in h.items()}
    assert float(pkt(h)) == pytest.approx(float(pkt(grown)), rel=1e-6)
    assert float(pkt(h, scale="row_sum")) == pytest.approx(17 * float(pkt(h)), rel=1e-13)


@pytest.mark.parametrize(
    "dtype, power", [(torch.float32, 110), (torch.float64, 700), (torch.float64, 1010)], ids=str
)
def test_rows_of_any_size(dtype, power):
    """Against rows of which eps is as small a part."""
    small, large = (
        {name: (x.detach() * 2.0**n).requires_grad_() for name, x in random_views(9, dtype=dtype).items()}
        for n in (40, power)
    )
    # Upstream, so that gradients of large rows are no subnormal numbers.
    expected, theirs = evaluate(pkt, small, upstream=2.0**40)
    loss, grads = evaluate(pkt, large, upstream=2.0**40)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    close([g.double() * 2.0 ** (power - 40) for g in grads], theirs, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0, 1e-14])
def test_rows_without_direction_get_no_gradient(dtype, size):
    h = random_views(9, (20, 30, 10), dtype)
    with torch.no_grad():
        h["t"][2] *= size
    exact = {name: x.detach().double().requires_grad_() for name, x in h.items()}
    expected, by_reference = evaluate(reference, exact)
    loss, grads = evaluate(pkt, h)
    assert float(loss) == pytest.approx(float(expected), rel=2e-6)
    assert not grads[0][2].any() and grads[0][3].any()
    close(grads, by_reference, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opposite_rows_stay_finite(rows, dtype):
    x = torch.ones(rows, 1, dtype=dtype)
    x[0] = -1
    for exclude_self in (False, True):
        views = {"t": x.clone().requires_grad_(), "v": torch.ones(rows, 1, dtype=dtype, requires_grad=True)}
        loss, grads = evaluate(pkt, views, exclude_self=exclude_self)
        assert loss.isfinite() and all(g.isfinite().all() for g in grads)


# An op among PyTorch's own.


def test_only_what_is_needed_is_computed():
    h, w = random_views(9), random_weights(9)
    _, (t, _v, a) = evaluate(pkt, h, w)
    h["v"].requires_grad_(False)
    _, grads = evaluate(pkt, h, w)
    close(grads, (t, a), 1e-14)
    _, (t, a) = evaluate(pkt, h, pairs=[("v", "a"), ("t", "a")], teacher_grad=False)
    assert not t.any() and a.any()
    with torch.no_grad():
        assert not pkt(h).requires_grad


def test_slices_of_larger_buffers():
    h = random_views(17, (6, 6, 6))
    w = random_weights(17)
    expected = evaluate(pkt, h, w)
    buffer = torch.full((6, 40, 3), 7.0, dtype=torch.float64)
    views, weights = {}, {}
    for i, (name, x) in enumerate(h.items()):
        buffer[:, 3:20, i] = x.detach().T
        views[name] = buffer[:, 3:20, i].T.detach().requires_grad_()
    for pair, g in w.items():
        weights[pair] = torch.stack((g, g), 1)[:, 0]
    got = evaluate(pkt, views, weights)
    close([got[0], *got[1]], [expected[0], *expected[1]], 1e-13)
    assert (buffer[:, :3] == 7).all() and (buffer[:, 20:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_reruns_are_bit_equal(dtype, monkeypatch):
    monkeypatch.setattr(ops, "STRIP", 500)
    h, w = random_views(65, (20, 30, 5), dtype), random_weights(65)
    first, again = (evaluate(pkt, h, w) for _ in range(2))
    assert torch.equal(first[0], again[0]) and all(map(torch.equal, first[1], again[1]))


def test_autocast_changes_nothing():
    h, w = random_views(33, (40, 20, 30), torch.float32), random_weights(33)
    expected = evaluate(pkt, h, w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate(pkt, h, w)
    assert torch.equal(got[0], expected[0]) and all(map(torch.equal, got[1], expected[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_saved_for_backward(dtype):
    rows = 300
    h, w = random_views(rows, (8, 9, 10), dtype), random_weights(rows)
    confidence = {name: torch.rand(rows) for name in NAMES}
    for call, own in ((lambda: pkt(h, w), 8), (lambda: directed_pkt(h, confidence), 16)):
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = call()
        inputs = [*h.values(), *(w.values() if own == 8 else ())]
        own *= loss.element_size() // 4
        assert 0 < sum(storages.values()) <= sum(x.nbytes for x in inputs) + 3 * own * rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(dtype, weighted):
    h = [x.detach() for x in random_views(7, dtype=dtype).values()]
    w = [torch.rand(7) for _ in range(3)] if weighted else []
    settings = ([0, 1, 2], [1, 0, 0], 1e-8, False, True, True, [True, False, True])
    names = ["pkt", *NAMES, *"123"[: len(w)]]
    torch.library.opcheck(torch.ops.mmfast.pkt_forward, (h, w, *settings, names))
    loss, scalars = torch.ops.mmfast.pkt_forward(h, w, *settings, names)
    torch.library.opcheck(torch.ops.mmfast.pkt_backward, (torch.ones_like(loss), h, w, scalars, *settings))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic):
    torch.compiler.reset()

    def both(views, weights, confidence):
        return pkt(views, weights, teacher_grad=False) + 2 * directed_pkt(
            views, confidence, preset="released"
        )

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (9, 14):
        h, w = random_views(rows, dtype=torch.float32), random_weights(rows)
        confidence = {name: torch.rand(rows) for name in NAMES}
        expected = evaluate(both, h, w, confidence)
        got = evaluate(compiled, h, w, confidence)
        close([got[0], *got[1]], [expected[0], *expected[1]], 1e-6)


def test_second_derivatives_are_refused_in_one_sentence():
    h = random_views(6)
    (grad,) = torch.autograd.grad(pkt(h), h["t"], create_graph=True)
    (expected,) = torch.autograd.grad(pkt(h), h["t"])
    assert torch.equal(grad, expected)
    with pytest.raises(RuntimeError, match=r"^pkt: the gradient must not be differentiated again"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match=r"^pkt: torch.func transforms and forward mode must not"):
        torch.func.grad(lambda t: pkt({**h, "t": t}))(h["t"])
