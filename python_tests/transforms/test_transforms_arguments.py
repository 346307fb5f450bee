"""What transforms take and what they refuse: numbers, switches, seeds, chains, mappings; the rest by name."""

import inspect
from collections import UserDict
from fractions import Fraction

import numpy as np
import pytest
import torch

from mmfast import Chain, FeatureMask, GaussianNoise, SeqAug, TimeMask, TwoViews

ALPHA = {"text": 0.15, "audio": 0.10, "visual": 0.20}
X = torch.zeros(2, 5, 3)
BAD_CALLS = {
    "SeqAug: alpha must be in [0, 1], got 1.5": lambda: SeqAug(1.5),
    "SeqAug: alpha['text'] must be in [0, 1], got -0.1": lambda: SeqAug({"text": -0.1}),
    "SeqAug: alpha must be in [0, 1], got nan": lambda: SeqAug(float("nan")),
    "SeqAug: p must be in [0, 1], got 2": lambda: SeqAug(0.1, p=2),
    "SeqAug: p_t must be in [0, 1], got -1": lambda: SeqAug(0.1, p_t=-1),
    "SeqAug: spread must be finite and at least 0, got -1": lambda: SeqAug(0.1, spread=-1),
    "SeqAug: count must be 'bernoulli' or 'exact', got 'all'": lambda: SeqAug(0.1, count="all"),
    "SeqAug: apply must be one of modality, batch, sample, got 'x'": lambda: SeqAug(0.1, apply="x"),
    "TimeMask: q must be in [0, 1], got 70": lambda: TimeMask(70),
    "FeatureMask: q must be a number, got '0.1'": lambda: FeatureMask("0.1"),
    "GaussianNoise: sigma must be in [0, 3.40282e+38], got -1": lambda: GaussianNoise(-1),
    "Chain: transforms must be SeqAug, masks, noise or chains of them, got 3": lambda: Chain([3]),
    "SeqAug: x must be (B, L, F), got shape (5, 3)": lambda: SeqAug()(X[0]),
    "SeqAug: x must be one of float32, float64, bfloat16, float16, got int64": lambda: SeqAug()(X.long()),
    "TimeMask: values must be a tensor (B, L, F) or a dict of them, got list": lambda: TimeMask()([X]),
    "TimeMask: values must be a tensor (B, L, F) or a dict of them, got an empty dict": lambda: TimeMask()(
        {}
    ),
    "TimeMask: values['audio'] must have the dtype of values['text'], torch.float32, got torch.float64": (
        lambda: TimeMask()({"text": X, "audio": X.double()})
    ),
    "TimeMask: values['audio'] must have the batch size of values['text'], 2, got 1": (
        lambda: TimeMask()({"text": X, "audio": X[:1]})
    ),
    "SeqAug: alpha must have a value for modality 'video', got values for text, audio, visual": (
        lambda: SeqAug(ALPHA)({"video": X})
    ),
    "SeqAug: alpha is given per modality (text, audio, visual), so x must be a dict of tensors": (
        lambda: SeqAug(ALPHA)(X)
    ),
    "Chain: lengths must name modalities of values (text), got 'audio'": (
        lambda: Chain([])({"text": X}, {"audio": torch.tensor([1, 2])})
    ),
    "Chain: lengths must be integers of shape (2,), got float32 of shape (2,)": lambda: Chain([])(
        X, torch.ones(2)
    ),
    "Chain: lengths must be a tensor, or a dict beside a dict of values, got list": lambda: Chain([])(
        X, [5, 5]
    ),
    "Chain: lengths must be in [0, 5], got 6": lambda: Chain([])(X, torch.tensor([6, 1])),
    "TwoViews: lengths of 'audio' must be in [0, 4], got 5": lambda: TwoViews([])(
        {"text": X, "audio": X[:, :4]}, torch.tensor([5, 1])
    ),
    "SeqAug: lengths of 'audio' must be in [0, 4], got -1": lambda: SeqAug()(
        {"text": X, "audio": X[:, :4]}, {"audio": torch.tensor([-1, 1])}
    ),
    "SeqAug: lengths must be integers of shape (2,), got bool of shape (2,)": lambda: SeqAug()(
        X, torch.tensor([True, False])
    ),
    "SeqAug: lengths['text'] must be integers of shape (2,), got complex64 of shape (2,)": lambda: SeqAug()(
        {"text": X}, {"text": torch.ones(2, dtype=torch.complex64)}
    ),
    "SeqAug: lengths['text'] must be a tensor of integers, got list": lambda: SeqAug()(
        {"text": X}, {"text": [1, 2]}
    ),
    "SeqAug: lengths must be integers of shape (2,), got sparse_coo int64 of shape (2,)": lambda: SeqAug()(
        X, torch.tensor([1, 2]).to_sparse()
    ),
    "TimeMask: ids must be a tensor of int64, got list": lambda: TimeMask()(X, ids=[0, 1]),
    "TimeMask: ids must be int64 of shape (2,), got int32 of shape (2,)": lambda: TimeMask()(
        X, ids=torch.tensor([0, 1], dtype=torch.int32)
    ),
    "SeqAug: spread must be finite and at least 0, got inf": lambda: SeqAug(spread=float("inf")),
    "SeqAug: spread must be a number, got dict": lambda: SeqAug(spread={"text": 0.1}),
    "SeqAug: p must be a number, got True": lambda: SeqAug(p=True),
    "SeqAug: alpha must be a number, got Parameter": lambda: SeqAug(torch.nn.Parameter(torch.tensor(0.1))),
    "GaussianNoise: mu['text'] must be a number, got None": lambda: GaussianNoise(mu={"text": None}),
    "SeqAug: shared_permutation must be True or False, got 'no'": lambda: SeqAug(shared_permutation="no"),
    "TimeMask: bernoulli must be True or False, got 1": lambda: TimeMask(bernoulli=1),
    "FeatureMask: bernoulli must be True or False, got 0.5": lambda: FeatureMask(0.2, bernoulli=0.5),
    "SeqAug: alpha must have a value for modality 'text', got values for none": lambda: SeqAug({})(
        {"text": X}
    ),
    "Chain: transforms must be SeqAug, masks, noise or chains of them, got TwoViews": lambda: Chain(
        [TwoViews([])]
    ),
    "Chain: transforms must be SeqAug, masks, noise or chains of them, got 'noise'": lambda: TwoViews(
        "noise"
    ),
    "Chain: transforms must be SeqAug, masks, noise or chains of them, got 0.5": lambda: TwoViews(
        SeqAug(), 0.5
    ),
    "SeqAug: x must be a dense tensor, got layout torch.sparse_coo": lambda: SeqAug()(X.to_sparse()),
    "SeqAug: values['text'] must be a dense tensor, got layout torch._mkldnn": lambda: SeqAug()(
        {"text": X.to_mkldnn()}
    ),
    "SeqAug: x must be a dense tensor, got a nested one": lambda: SeqAug()(
        torch.nested.nested_tensor([X[0], X[1]])
    ),
    "TwoViews: x must be a dense tensor, got a nested one": lambda: TwoViews([])(
        torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged)
    ),
    "TimeMask: values must be a tensor (B, L, F) or a dict of them, got an empty UserDict": lambda: (
        TimeMask()(UserDict())
    ),
    "SeqAug: seed must be an integer, got 1.9": lambda: SeqAug()(X, seed=1.9),
    "SeqAug: seed must be an integer, got '1'": lambda: SeqAug()(X, seed="1"),
    "SeqAug: seed must be an integer, got True": lambda: SeqAug()(X, seed=True),
    "SeqAug: seed must have 64 bits at most, got 18446744073709551616": lambda: SeqAug()(X, seed=2**64),
    "SeqAug: seed must have 64 bits at most, got -9223372036854775809": lambda: SeqAug()(
        X, seed=-(2**63) - 1
    ),
    "SeqAug: seed must be one int64, got float32 of shape (1,)": lambda: SeqAug()(X, seed=torch.ones(1)),
    "Chain: seed must be None beside a generator, got 0": lambda: Chain([])(
        X, seed=0, generator=torch.Generator()
    ),
    "Chain: generator must be a torch.Generator, got 5": lambda: Chain([])(X, generator=5),
    "Chain: ids must be int64 of shape (2,), got float32 of shape (2,)": lambda: Chain([])(
        X, ids=torch.ones(2)
    ),
    "Chain: seed must be one int64, got int64 of shape (2,)": lambda: Chain([])(X, seed=torch.tensor([1, 2])),
    "Chain: padding must be 'back' or 'front', got 'left'": lambda: Chain([])(X, padding="left"),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_named_in_one_sentence(message):
    with pytest.raises((ValueError, TypeError)) as error:
        BAD_CALLS[message]()
    assert str(error.value) == message


@pytest.mark.parametrize("transform", [SeqAug, TimeMask, FeatureMask, GaussianNoise])
def test_one_number_leads_and_options_have_names(transform):
    leading, *options = inspect.signature(transform).parameters.values()
    assert leading.kind is leading.POSITIONAL_OR_KEYWORD
    assert all(option.kind is option.KEYWORD_ONLY for option in options)
    with pytest.raises(TypeError, match="positional argument"):
        transform(0.1, 0.5)


def words(transform, **options):
    return transform.draw({"text": torch.zeros(64, 9, 40)}, **options).words


def test_numbers_of_any_library_are_numbers():
    """0.15 in fp32, unlike 0.15, times 2^32 must not be rounded to fp32 again."""
    value = np.float32(0.15)
    for given in (value, UserDict(text=value), {"text": Fraction(float(value))}, np.float64(value)):
        transform = SeqAug(given, p=np.int64(1), spread=np.float32(0), shared_permutation=np.bool_(True))
        plain = SeqAug(float(value), p=1, spread=0.0, shared_permutation=True)
        assert torch.equal(words(transform, seed=3), words(plain, seed=3))
    assert "alpha=0.15" in repr(SeqAug(np.float64(0.15)))


def test_seeds_are_64_bits_as_in_torch():
    """The word alone counts: 2^64 - 1 and -1 are one seed, for the transforms as for ``torch.manual_seed``."""
    pairs = [
        (2**63, -(2**63)),
        (2**64 - 1, -1),
        (np.uint64(2**63 + 5), -(2**63) + 5),
        (2**64 - 7, np.int64(-7)),
    ]
    chain = SeqAug(0.5, p=0.5, apply="sample")
    for seed, same in pairs:
        assert torch.equal(words(chain, seed=seed), words(chain, seed=same))
        assert torch.equal(words(chain, seed=seed), words(chain, seed=torch.tensor([int(same)])))
        rand = [torch.rand(3, generator=torch.Generator().manual_seed(int(s))) for s in (seed, same)]
        assert torch.equal(*rand)
    assert torch.equal(words(chain, seed=(s := torch.seed())), words(chain, seed=s))
    assert not torch.equal(words(chain, seed=2**63), words(chain, seed=0))


def test_seeds_are_64_bits_in_compiled_code():
    x, chain = torch.randn(3, 9, 4), SeqAug(0.5, p=0.5, apply="sample")
    compiled = torch.compile(lambda x, seed: chain(x, seed=seed), fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 3, -1, 2**62, -(2**63)):
        assert torch.equal(compiled(x, seed), chain(x, seed=seed))


def test_chains_are_flattened():
    """A transform is a chain of one; chains and lists may be nested: the order is what counts."""
    mask, aug, noise = TimeMask(0.5, p=1), SeqAug(0.5, p=1), GaussianNoise(p=1)
    x, flat = torch.randn(3, 9, 4), Chain([mask, aug, noise])
    for nested in ([Chain([mask, aug]), noise], [mask, [aug, Chain(noise)]], (t for t in [mask, aug, noise])):
        assert torch.equal(Chain(nested)(x, seed=1), flat(x, seed=1))
    assert torch.equal(Chain(mask)(x, seed=1), mask(x, seed=1))
    assert torch.equal(Chain(torch.nn.Sequential(mask, aug, noise))(x, seed=1), flat(x, seed=1))
    nested = TwoViews(mask, [Chain([aug]), noise])
    for a, b in zip(nested(x, seed=1), TwoViews([mask], [aug, noise])(x, seed=1), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="Chain: transforms must be at most 255, got 256"):
        Chain([Chain([mask] * 255), mask])


@pytest.mark.parametrize("training", [True, False])
def test_any_mapping_holds_modalities(training):
    x = UserDict(text=torch.randn(2, 5, 3), audio=torch.randn(2, 4, 6))
    lengths = UserDict(text=torch.tensor([5, 2]), audio=torch.tensor([4, 0]))
    views = TwoViews([SeqAug(0.5, p=1), GaussianNoise(p=1)]).train(training)
    for a, b in zip(views(x, lengths, seed=1), views(dict(x), dict(lengths), seed=1), strict=True):
        assert type(a) is dict and list(a) == ["text", "audio"]
        assert all(torch.equal(a[name], b[name]) for name in a)
    plan = views.draw(x, lengths, seed=1)
    assert plan.names == ("text", "audio") and type(plan.apply(x)[0]) is dict
