"""Devices: the default device changes nothing, and tensors of different devices never meet in a kernel."""

import ast
from pathlib import Path

import pytest
import torch
from targets import INTERPRETED, TARGETS
from torch.utils._device import _device_constructors

import mmfast
from mmfast import (
    BarlowTwinsLoss,
    Chain,
    FeatureMask,
    GaussianNoise,
    MultiViewBarlowTwinsLoss,
    Plan,
    SeqAug,
    TimeMask,
    TwoViews,
    backward_in_micro_batches,
)
from mmfast.data import BucketSampler, MultimodalDataset, Standardiser, collate, label_share, synthetic
from mmfast.functional import barlow_twins
from mmfast.models import M3Encoder, Projector, RegressionHead
from mmfast.ops.augment.plan import chains

PACKAGE = Path(mmfast.__file__).parent
STEPS = [GaussianNoise(0.3, p=1), SeqAug(0.6, p=1, p_t=0.7), TimeMask(0.4, p=1), FeatureMask(0.3, p=1)]
ON_CPU = [pair for pair in (*TARGETS, *INTERPRETED) if pair[1] == "cpu"]
every_backend = pytest.mark.parametrize("name", [name for name, _ in ON_CPU])


@pytest.fixture
def elsewhere():
    """Whatever forgets to name its device lands on one whose tensors have no data."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_every_factory_names_its_device():
    makers = {function.__name__ for function in _device_constructors()}
    unnamed = [
        f"{path.relative_to(PACKAGE)}:{call.lineno}: {ast.unparse(call)}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "torch"
        and call.func.attr in makers
        and not {"device", None}
        & {keyword.arg for keyword in call.keywords}  # None: what ** holds is not seen here
    ]
    assert not unnamed


def inputs(samples=3):
    x = {
        name: torch.randn(samples, *shape, device="cpu")
        for name, shape in (("text", (4, 3)), ("audio", (5, 2)))
    }
    lengths = {"text": torch.tensor([4, 1, 0][:samples], device="cpu")}
    return x, lengths


@every_backend
def test_augmentation_under_a_default_device(elsewhere, name):
    # Triton's interpreter takes its time for each sample.
    samples = 1 if name == "triton" else 3
    x, lengths = inputs(samples)
    views = TwoViews(STEPS, STEPS[::-1])
    with mmfast.backend(name):
        leaf = x["text"].requires_grad_()
        for given in (None, lengths):
            a, b = views(x, given, seed=3)
            again = views.draw(x, given, seed=3)
            for plan in (again, Plan.from_state_dict(again.state_dict()), again.to("cpu")):
                assert f"Plan of {samples} samples" in str(plan)
                for view, copy in zip((a, b), plan.apply(x), strict=True):
                    assert all(torch.equal(view[m], copy[m]) for m in view)
            (gradient,) = torch.autograd.grad(a["text"].square().sum() + b["text"].sum(), leaf)
            assert gradient.device.type == "cpu" and gradient.any()
        views(x), views(x, generator=torch.Generator("cpu").manual_seed(1))
        tangent = torch.func.jvp(lambda t: views({**x, "text": t}, seed=3)[0]["text"], (leaf,), (leaf,))[1]
        assert tangent.device.type == "cpu"


@every_backend
def test_losses_under_a_default_device(elsewhere, name):
    z = [torch.randn(6, 4, device="cpu", requires_grad=True) for _ in range(3)]
    with mmfast.backend(name):
        for variant in ("official", "thesis", "monai"):
            barlow_twins(z[0], z[1], variant=variant).backward()
        BarlowTwinsLoss()(z[0], z[1]).backward()
        MultiViewBarlowTwinsLoss()(z).backward()
    assert all(v.grad.device.type == "cpu" and v.grad.isfinite().all() for v in z)


def test_micro_batches_under_a_default_device(elsewhere):
    net = torch.nn.Linear(3, 4, device="cpu")
    x = torch.randn(8, 3, device="cpu")
    backward_in_micro_batches(BarlowTwinsLoss(), lambda part: (net(part), net(part.square())), [x[:4], x[4:]])
    assert net.weight.grad.any()


def test_models_under_a_default_device(elsewhere):
    """Weights are made on the default device, as those of PyTorch's modules; nothing else is."""
    with torch.device("cpu"):
        encoder = M3Encoder({"text": 3, "audio": 2, "visual": 2}, hidden=4)
        heads = [Projector(encoder.out_features, [5, 5]), RegressionHead(encoder.out_features)]
    x, lengths = inputs()
    x["visual"] = x["audio"]
    x["text"], lengths = (
        torch.randn(3, 5, 3, device="cpu"),
        dict.fromkeys(x, torch.tensor([5, 1, 3], device="cpu")),
    )
    for mode in (True, False):
        out = encoder.train(mode)(x, lengths)
        assert all(head.train(mode)(out).device.type == "cpu" for head in heads)
    assert {p.device.type for p in M3Encoder({"text": 3, "audio": 2, "visual": 2}).parameters()} == {"meta"}


def test_data_under_a_default_device(elsewhere):
    data = synthetic(20, max_length=4, features={"text": 2, "audio": 3})
    train = label_share(data.train, 0.5, 1)
    standardise = Standardiser().fit(train)
    train = standardise.transform(train)
    sampler = BucketSampler(train, 4)
    batch = collate([train[i] for i in sampler.batches(0)[0]])
    batch = standardise.transform(batch)
    assert batch.values["text"].device.type == batch.labels.device.type == "cpu"
    empty = MultimodalDataset.empty({"text": 3})
    assert len(empty) == 0 and empty.flat("text").device.type == "cpu"


ops = torch.ops.mmfast
META = torch.device("meta")


def op_arguments():
    x, lengths, seed, ids = (
        torch.randn(2, 4, 3),
        torch.tensor([4, 2]),
        torch.tensor([1]),
        torch.tensor([5, 6]),
    )
    table = chains([[[step.step(None)] for step in STEPS]])
    plan = ops.augment_draw(seed, ids, [lengths], *table, 2, [4, 3])
    return x, lengths, seed, ids, table, plan


@every_backend
@pytest.mark.parametrize("moved", ["seed", "ids", "lengths of modality 0", "plan", "values of modality 1"])
def test_ops_refuse_tensors_of_different_devices(name, moved):
    """Kernels take addresses: there, what lies elsewhere ends the process."""
    x, lengths, seed, ids, table, plan = op_arguments()
    given = {
        "seed": seed,
        "ids": ids,
        "lengths of modality 0": lengths,
        "plan": plan,
        "values of modality 1": x,
    }
    given[moved] = given[moved].to(META)
    seed, ids, lengths, plan, y = given.values()
    two = chains([[[step.step(None)] * 2 for step in STEPS]])
    if moved == "values of modality 1":
        plan = ops.augment_draw(seed, ids, [lengths, lengths], *two, 2, [4, 3, 4, 3])
        xs, all_lengths, table = [x, y], [lengths, lengths], two
    else:
        xs, all_lengths = [x], [lengths]
    with mmfast.backend(name):
        if moved in ("ids", "lengths of modality 0"):
            with pytest.raises(
                mmfast.UserError, match=f"augment_draw: {moved} must be on cpu like seed, got meta"
            ):
                ops.augment_draw(seed, ids, [lengths], *table, 2, [4, 3])
        with pytest.raises(
            mmfast.UserError, match=f"augment_apply: {moved} must be on cpu like values, got meta"
        ):
            ops.augment_apply(xs, all_lengths, seed, ids, plan, *table, False, True)
        moved = moved.replace("values", "gradients")
        with pytest.raises(
            mmfast.UserError, match=f"augment_adjoint: {moved} must be on cpu like gradients, got"
        ):
            ops.augment_adjoint(xs, all_lengths, seed, ids, plan, *table, False)


def test_plans_are_moved_with_all_they_hold():
    x, lengths = inputs()
    plan = TwoViews(STEPS).draw(x, lengths, seed=1)
    there = plan.to("meta")
    assert {t.device for t in (there.words, there.seed, there.ids, there.lengths[0])} == {META}
    assert there.lengths[1] is None and there.shapes == plan.shapes and plan.words.device.type == "cpu"
    views = there.apply({name: value.to(META) for name, value in x.items()})
    assert views[1]["audio"].device == META and views[1]["audio"].shape == x["audio"].shape
    with pytest.raises(
        mmfast.UserError, match=r"Plan\.apply: values must be on the device of the plan, meta, got cpu"
    ):
        there.apply(x)
    with pytest.raises(
        mmfast.UserError, match=r"Plan\.apply: values must be on the device of the plan, cpu, got meta"
    ):
        plan.apply({name: value.to(META) for name, value in x.items()})
    for part in ("seed", "ids"):
        state = plan.state_dict() | {part: plan.state_dict()[part].to(META)}
        with pytest.raises(mmfast.UserError, match=f"Plan: {part} must be on cpu like words, got meta"):
            Plan.from_state_dict(state)
    state = plan.state_dict() | {"lengths": [lengths["text"].to(META), None]}
    with pytest.raises(mmfast.UserError, match="Plan: lengths of 'text' must be on cpu like words, got meta"):
        Plan.from_state_dict(state)


def test_transforms_take_lengths_ids_and_seeds_from_elsewhere_if_they_can_be_copied():
    x = torch.randn(2, 4, 3)
    options = {"lengths": torch.tensor([4, 2]), "ids": torch.tensor([5, 6]), "seed": torch.tensor([1])}
    there = Chain(STEPS)(x.to(META), **options)
    assert there.device == META and there.shape == x.shape
    for name in options:
        with pytest.raises(mmfast.UserError, match=f"Chain: {name} must be on cpu like values, .* got meta"):
            Chain(STEPS)(x, **(options | {name: options[name].to(META)}))
