"""Tasks: losses over what is labelled, in parts as in the whole; predictions; settings; what a checkpoint records."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from mmfast.errors import UserError
from mmfast.models import LinearHead, RegressionHead
from mmfast.tasks import Classification, MultiLabel, Regression, balanced_classes, make_task, task_of

NAN = math.nan
VAD = ("valence", "arousal", "dominance")
# Each with the labels of seven samples, some of them without.
CASES = {
    "mae": (Regression(("label",)), [0.5, NAN, -1.0, 2.0, NAN, 0.25, 1.0]),
    "mse": (Regression(("label",), "mse"), [0.5, NAN, -1.0, 2.0, NAN, 0.25, 1.0]),
    "huber": (Regression(("label",), "huber"), [0.5, NAN, -3.0, 4.0, NAN, 0.25, 1.0]),
    "several": (
        Regression(VAD, "mse"),
        [[0.5, NAN, 1], [NAN] * 3, [1, 2, 3], [NAN, NAN, 0], [0, 0, 0], [NAN] * 3, [4, 1, 0]],
    ),
    "classes": (Classification(("a", "b", "c")), [0, NAN, 2, 1, NAN, 1, 0]),
    "weighted classes": (Classification(("a", "b", "c"), (1, 0.5, 3)), [0, NAN, 2, 1, NAN, 1, 0]),
    "labels": (MultiLabel(("x", "y")), [[0, 1], [NAN, NAN], [1, NAN], [0, 0], [1, 1], [NAN, NAN], [NAN, 0]]),
    "weighted labels": (
        MultiLabel(("x", "y"), (2, 5)),
        [[0, 1], [NAN, NAN], [1, NAN], [0, 0], [1, 1], [NAN, NAN], [NAN, 0]],
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    task, labels = CASES[request.param]
    labels = torch.tensor(labels, dtype=torch.float64)
    return task, torch.randn(len(labels), task.outputs, dtype=torch.float64, requires_grad=True), labels


def expected(task, outputs, labels):
    """The mean loss by another way: of each labelled cell alone."""
    total = weight = 0.0
    for row, truth in zip(outputs, labels, strict=True):
        if isinstance(task, Classification):
            if not truth.isnan():
                w = 1.0 if task.weights is None else task.weights[int(truth)]
                total, weight = total - w * row.log_softmax(0)[int(truth)], weight + w
            continue
        for k, (x, y) in enumerate(zip(row, truth.reshape(-1), strict=True)):
            if y.isnan():
                continue
            weight += 1
            if isinstance(task, MultiLabel):
                w = 1.0 if task.weights is None else task.weights[k]
                total = total - (w * y * F.logsigmoid(x) + (1 - y) * F.logsigmoid(-x))
            else:
                e = (x - y).abs()
                huber = 0.5 * e**2 if e <= 1 else e - 0.5
                total = total + {"mae": e, "mse": e**2, "huber": huber}[task.error]
    return total / weight


def test_the_loss_is_its_formula_over_what_is_labelled_and_its_gradient_is_right(case):
    task, outputs, labels = case
    total, weight = task.loss(outputs, labels)
    torch.testing.assert_close(total / weight, expected(task, outputs, labels))
    assert torch.autograd.gradcheck(lambda x: task.loss(x, labels)[0], outputs)


def test_what_has_no_label_has_a_gradient_of_exactly_zero(case):
    task, outputs, labels = case
    task.loss(outputs, labels)[0].backward()
    known = ~labels.reshape(len(labels), -1).isnan().expand_as(outputs)
    assert (outputs.grad[~known] == 0).all()
    assert (outputs.grad[known] != 0).all()


def test_sums_and_weights_of_two_halves_add_up_to_the_whole(case):
    task, outputs, labels = case
    whole, first, second = (
        task.loss(outputs, labels),
        task.loss(outputs[:3], labels[:3]),
        task.loss(outputs[3:], labels[3:]),
    )
    for i in range(2):
        torch.testing.assert_close(first[i] + second[i], whole[i])


def test_a_batch_without_labels_weighs_nothing_and_teaches_nothing(case):
    task, outputs, labels = case
    total, weight = task.loss(outputs, torch.full_like(labels, NAN))
    assert total.item() == 0 and weight.item() == 0
    total.backward()
    assert (outputs.grad == 0).all()


def test_mean_absolute_error_is_that_of_the_labelled_bit_for_bit():
    outputs, labels = torch.randn(33, 1, requires_grad=True), torch.randn(33)
    labels[::3] = NAN
    known = ~labels.isnan()
    before = (outputs[:, 0][known] - labels[known]).abs().mean()
    (gradient,) = torch.autograd.grad(before, outputs)
    total, weight = Regression(("label",)).loss(outputs, labels)
    assert torch.equal(total / weight, before)
    assert torch.equal(torch.autograd.grad(total / weight, outputs)[0], gradient)


def test_a_sample_is_labelled_if_one_of_its_targets_is():
    labels = torch.tensor([[NAN, NAN], [1, NAN], [0, 0]])
    assert MultiLabel(("x", "y")).labelled(labels).tolist() == [False, True, True]
    assert Regression(("label",)).labelled(torch.tensor([NAN, 0.0])).tolist() == [False, True]


def test_predictions_are_numbers_or_probabilities_in_named_columns(case):
    task, outputs, _ = case
    p = task.predictions(outputs)
    assert p.shape == (len(outputs), len(task.columns))
    if isinstance(task, Classification):
        torch.testing.assert_close(p.sum(1), torch.ones(len(p), dtype=p.dtype))
    elif isinstance(task, MultiLabel):
        torch.testing.assert_close(p, 1 / (1 + (-outputs).exp()))
    else:
        assert p is outputs


def test_a_task_comes_back_from_plain_values(case):
    task = case[0]
    assert task_of(task.state()) == task
    assert task.targets[0] in task.describe() and task.loss_title in task.describe()


def test_balanced_weights_are_those_of_the_training_labels():
    labels = torch.tensor([0, 0, 0, 1, 2, 2, NAN])
    task = make_task("classification", ("a", "b", "c"), class_weights="balanced", labels=labels)
    assert task.weights == pytest.approx((6 / 9, 6 / 3, 6 / 6))
    # Each class then weighs the same in the loss.
    assert float(task.loss(torch.zeros(7, 3), labels)[1]) == pytest.approx(6)
    labels = torch.tensor([[1, 0], [0, 0], [0, NAN], [0, 1]])
    task = make_task("multilabel", ("x", "y"), positive_weights="balanced", labels=labels)
    assert task.weights == pytest.approx((3, 2))
    assert balanced_classes(torch.tensor([0.0, 0.0]), 2) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("arguments", "settings", "sentence"),
    [
        (("ranking", ("a",)), {}, "must be one of regression, classification, multilabel, got 'ranking'"),
        (
            ("classification", ("a", "b")),
            {"loss": "mse"},
            "loss is for regression, and the data's task is classification",
        ),
        (("regression", ("a",)), {"threshold": 0.4}, "threshold is for multilabel"),
        (("multilabel", ("a",)), {"class_weights": "balanced"}, "class_weights is for classification"),
        (
            ("multilabel", ("a",)),
            {"threshold": 1.0},
            r"threshold must be in \(0, 1\)",
        ),
        (("regression", ("a",)), {"loss": "mape"}, "loss must be one of mae, mse, huber, got 'mape'"),
        (
            ("classification", ("a", "b")),
            {"class_weights": [1.0]},
            "must be 2 numbers, one for each of a, b, got 1",
        ),
        (("classification", ("a", "b")), {"class_weights": [1.0, 0.0]}, "class_weights.1. must be"),
        (("classification", ("a",)), {}, "two classes at least"),
        (("multilabel", ("a", "a")), {}, "each once"),
    ],
)
def test_refusals(arguments, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        make_task(*arguments, **settings)


def test_a_class_or_label_without_training_samples_is_refused():
    with pytest.raises(UserError, match=r"every class must have a labelled training sample, .* none of 'b'"):
        Classification(("a", "b", "c")).check_trained(torch.tensor([0, 2, NAN]))
    with pytest.raises(UserError, match=r"every label .* none of 'y'"):
        MultiLabel(("x", "y")).check_trained(torch.tensor([[1, 0], [0, NAN]]))
    Regression(("label",)).check_trained(torch.tensor([NAN]))


def test_heads_of_any_width_start_from_the_same_layer_as_the_head_of_one_number():
    torch.manual_seed(1)
    one = RegressionHead(5)
    torch.manual_seed(1)
    head = LinearHead(5, 1)
    assert {n: p.tolist() for n, p in one.state_dict().items()} == {
        n: p.tolist() for n, p in head.state_dict().items()
    }
    x = torch.randn(4, 5)
    assert torch.equal(head(x)[:, 0], one(x)) and LinearHead(5, 6)(x).shape == (4, 6)
    with pytest.raises(UserError, match="LinearHead: outputs must be"):
        LinearHead(5, 0)
