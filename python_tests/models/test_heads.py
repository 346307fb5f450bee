"""Projector and head: their formulas, sizes and refusals."""

import pytest
import torch
from encoder_help import CLOSE
from torch import nn

from mmfast.errors import UserError
from mmfast.models import Projector, RegressionHead, parameter_count


def test_projector_counts_and_layers():
    assert parameter_count(Projector(100)) == 2_104_000
    assert parameter_count(Projector(200)) == 2_204_000
    projector = Projector(6, (5, 4, 3))
    names = [type(layer).__name__ for layer in projector]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert all(layer.bias is None for layer in projector if isinstance(layer, nn.Linear))
    assert projector.out_features == 3 and Projector(6, (9,)).out_features == 9


def test_projector_is_the_formula():
    torch.manual_seed(0)
    projector, x = Projector(6, (5, 3)).double(), torch.randn(7, 6, dtype=torch.float64)
    h = x @ projector[0].weight.T
    h = (h - h.mean(0)) / torch.sqrt(h.var(0, unbiased=False) + 1e-5)
    torch.testing.assert_close(projector(x), h.relu() @ projector[3].weight.T, **CLOSE)


@pytest.mark.parametrize("make", [lambda: Projector(6, (5, 3)), lambda: RegressionHead(6)])
def test_vector_layers_refuse_other_shapes(make):
    layer = make()
    with pytest.raises(UserError, match=r"must have the shape \(B, 6\), got \(4, 7\)"):
        layer(torch.zeros(4, 7))
    with pytest.raises(UserError, match=r"must have the shape \(B, 6\), got \(2, 4, 6\)"):
        layer(torch.zeros(2, 4, 6))
    with pytest.raises(UserError, match="the batch is empty"):
        layer(torch.zeros(0, 6))


def test_projector_refuses_what_batch_norm_cannot_do():
    projector = Projector(6, (5, 3))
    with pytest.raises(UserError, match="at least two samples in training mode, got 1"):
        projector(torch.zeros(1, 6))
    assert projector.eval()(torch.zeros(1, 6)).shape == (1, 3)
    assert Projector(6, (3,))(torch.zeros(1, 6)).shape == (1, 3)
    for bad, message in (
        ((6, ()), r"widths must be a sequence of one integer or more, got tuple"),
        ((0, (3,)), "in_features must be at least 1, got 0"),
        ((6, (3, 0)), r"widths\[1\] must be at least 1, got 0"),
    ):
        with pytest.raises(UserError, match=message):
            Projector(*bad)


def test_head_is_linear_with_dropout_before_it():
    torch.manual_seed(0)
    head, x = RegressionHead(6, dropout=0.5), torch.randn(5, 6)
    assert head(x).shape == (5,) and not torch.equal(head(x), head(x))
    torch.testing.assert_close(head.eval()(x), x @ head.linear.weight[0] + head.linear.bias)
    assert parameter_count(head) == 7
    for in_features, dropout in ((0, 0.0), (6, 1.0)):
        with pytest.raises(UserError, match="RegressionHead: "):
            RegressionHead(in_features, dropout=dropout)


def test_parameter_count_takes_shared_parameters_once_and_no_buffers():
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    assert parameter_count(nn.Sequential(layer, layer, nn.BatchNorm1d(2))) == 8 + 4
