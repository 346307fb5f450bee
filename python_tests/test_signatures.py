"""What may be positional: tensors and one leading number. A number too many must not become another option."""

import inspect

import pytest

import mmfast
from mmfast import functional, losses, metrics, models
from mmfast.losses.barlow_twins import Options
from mmfast.models.layers import attention, masking
from mmfast.models.layers import recurrent as rnn

PUBLIC = [
    mmfast.BarlowTwinsLoss,
    mmfast.MultiViewBarlowTwinsLoss,
    *(
        f
        for name in losses.__all__
        if inspect.isclass(f := getattr(losses, name)) and "BarlowTwins" not in name
    ),
    mmfast.backward_in_micro_batches,
    mmfast.plot_cross_correlation,
    *(f for name in functional.__all__ if inspect.isfunction(f := getattr(functional, name))),
    *(f for f in vars(metrics).values() if inspect.isfunction(f) and f.__module__ == metrics.__name__),
    *(getattr(models, name) for name in models.__all__),
    attention.Attention,
    attention.SymmetricAttention,
    masking.ModalityMasking,
    rnn.MaskedLSTM,
]
PUBLIC = [f for f in PUBLIC if not f.__name__.startswith(("_", "evaluate", "check"))]


@pytest.mark.parametrize("call", PUBLIC, ids=lambda f: f.__name__)
def test_one_optional_number_at_most_is_positional_and_no_switch(call):
    positional = [
        p
        for p in inspect.signature(call).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty
    ]
    plain = [p for p in positional if any(t in str(p.annotation) for t in ("float", "int", "bool", "str"))]
    plain = [p for p in plain if not any(t in str(p.annotation) for t in ("Tensor", "Mapping", "Sequence"))]
    assert len(plain) <= 1 and not any("bool" in str(p.annotation) for p in plain)


@pytest.mark.parametrize(
    "call",
    [
        functional.barlow_twins,
        functional.barlow_twins_components,
        functional.multi_view_barlow_twins,
        mmfast.BarlowTwinsLoss,
        mmfast.MultiViewBarlowTwinsLoss,
    ],
    ids=lambda f: f.__name__,
)
def test_options_of_barlow_twins_are_the_same_everywhere(call):
    parameters = inspect.signature(call).parameters
    found = {name: p.default for name, p in parameters.items() if name in Options._fields}
    assert found == Options()._asdict()
    assert all(
        p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name in found and name != "lambd"
    )
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


UNKNOWN = [
    ("BarlowTwinsLoss.__init__", lambda: mmfast.BarlowTwinsLoss(lamda=1.0)),
    ("MultiViewBarlowTwinsLoss", lambda: mmfast.MultiViewBarlowTwinsLoss(lamda=1.0)),
    ("barlow_twins_components", lambda: functional.barlow_twins_components(None, None, lamda=1.0)),
    ("multi_view_barlow_twins", lambda: functional.multi_view_barlow_twins([], lamda=1.0)),
]


@pytest.mark.parametrize(("name", "call"), UNKNOWN, ids=[name for name, _ in UNKNOWN])
def test_an_unknown_option_is_told_by_the_name_of_the_call(name, call):
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value).startswith(f"{name}() got an unexpected keyword argument 'lamda'")


def test_too_many_positional_arguments_are_told_by_the_name_of_the_loss():
    with pytest.raises(
        TypeError, match=r"^BarlowTwinsLoss\.__init__\(\) takes from 1 to 2 positional arguments"
    ):
        mmfast.BarlowTwinsLoss(1.0, 1e-12)


WRONG = [
    lambda: mmfast.BarlowTwinsLoss(256, 5e-3, 128),
    lambda: mmfast.BarlowTwinsLoss(1.0, 1e-12),
    lambda: mmfast.BarlowTwinsLoss(5e-3, False),
    lambda: functional.barlow_twins(*[None] * 2, 5e-3, False),
    lambda: functional.barlow_twins_components(*[None] * 2, 5e-3, False),
    lambda: functional.multi_view_barlow_twins([], None, 5e-3),
    lambda: mmfast.backward_in_micro_batches(None, None, [], 2.0),
    lambda: metrics.bootstrap_interval(metrics.mae, [1.0], [1.0], 20),
    lambda: models.M3Encoder({"text": 3}, 8, 0.1),
    lambda: models.RegressionHead(8, 0.1),
    lambda: masking.ModalityMasking(["text"], 0.0, "step"),
]


@pytest.mark.parametrize("call", WRONG, ids=range(len(WRONG)))
def test_calls_of_other_libraries_are_refused_instead_of_computing_something_else(call):
    with pytest.raises(TypeError, match="positional argument"):
        call()


SWITCHES = [
    (lambda: models.M3Encoder({"text": 3}, attention="no"), "M3Encoder: attention must be True or False, got 'no'"),
    (lambda: models.M3Encoder({"text": 3}, "8"), "M3Encoder: hidden must be an integer, got '8'"),
    (lambda: models.M3Encoder({"text": 3.0}), "M3Encoder: features of text must be an integer, got 3.0"),
    (lambda: models.RegressionHead(8, dropout="0.1"), "RegressionHead: dropout must be a number, got '0.1'"),
    (lambda: models.Projector(6, [4, True]), "Projector: widths[1] must be an integer, got True"),
    (lambda: masking.ModalityMasking(["a", "b"], "0.1"), "ModalityMasking: p must be a number, got '0.1'"),
    (
        lambda: metrics.bootstrap_interval(metrics.mae, [1.0], [1.0], n=2.5),
        "bootstrap_interval: n must be an integer, got 2.5",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), SWITCHES, ids=[x[1] for x in SWITCHES])
def test_numbers_and_switches_are_such(call, message):
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value) == message
