"""The transforms: invariants of SeqAug and masks, statistics, plans, and bad input."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import mmfast
from mmfast import Chain, FeatureMask, GaussianNoise, Plan, SeqAug, TimeMask, TwoViews

ALPHA = {"text": 0.15, "audio": 0.10, "visual": 0.20}


@st.composite
def batches(draw):
    """(x, lengths, padding): all real values of a batch are different, and padding is NaN."""
    b, length, features = draw(st.integers(1, 5)), draw(st.integers(1, 20)), draw(st.integers(1, 40))
    lengths = torch.tensor(draw(st.lists(st.integers(0, length), min_size=b, max_size=b)))
    padding = draw(st.sampled_from(["back", "front"]))
    x = torch.arange(1, b * length * features + 1, dtype=torch.float32).view(b, length, features)
    x[~real_steps(x, lengths, padding)] = float("nan")
    return x, lengths, padding


def masked_count(q, n):
    """Halves are rounded up; one is left over unless q = 1."""
    count = math.floor(q * n + 0.5)
    return count if q == 1 else min(count, max(n - 1, 0))


def real_steps(x, lengths, padding):
    t = torch.arange(x.shape[1])
    return t >= x.shape[1] - lengths[:, None] if padding == "front" else t < lengths[:, None]


seeds = st.integers(-(2**63), 2**63 - 1)


@given(batches(), seeds, st.floats(0, 1), st.sampled_from(["bernoulli", "exact"]))
def test_seqaug_moves_whole_features_in_one_order(batch, seed, alpha, count):
    x, lengths, padding = batch
    out = SeqAug(alpha, p=1, count=count)(x, lengths, seed=seed, padding=padding)
    real = real_steps(x, lengths, padding)
    assert out[~real].isnan().all()
    for before, after, inside in zip(x, out, real, strict=True):
        before, after = before[inside], after[inside]
        # The multiset of values of each feature is unchanged.
        assert torch.equal(before.sort(0).values, after.sort(0).values)
        # Features that moved all follow the same order; the others are bit-identical.
        moved = (before != after).any(0)
        if alpha == 0 or inside.sum() <= 1:
            assert not moved.any()
            continue
        source = (after[:, None, :] == before[None, :, :]).int().argmax(1)
        orders = source[:, moved]
        assert (orders == orders[:, :1]).all()


@given(batches(), seeds)
def test_closed_step_gate_is_the_identity_and_values_stay_in_their_feature(batch, seed):
    x, lengths, padding = batch
    same = SeqAug(1.0, p=1, p_t=0)(x, lengths, seed=seed, padding=padding)
    assert torch.equal(same.nan_to_num(-1), x.nan_to_num(-1))
    half = SeqAug(1.0, p=1, p_t=0.5)(x, lengths, seed=seed, padding=padding)
    for before, after, inside in zip(x, half, real_steps(x, lengths, padding), strict=True):
        for f in range(x.shape[2]):
            assert set(after[inside, f].tolist()) <= set(before[inside, f].tolist())


@given(batches(), seeds, st.floats(0, 1))
def test_time_mask_zeroes_an_exact_number_of_real_steps(batch, seed, q):
    x, lengths, padding = batch
    out = TimeMask(q, p=1)(x, lengths, seed=seed, padding=padding)
    real = real_steps(x, lengths, padding)
    for row, before, inside, n in zip(out, x, real, lengths, strict=True):
        zero = (row[inside] == 0).all(1)
        assert int(zero.sum()) == masked_count(q, int(n))
        assert torch.equal(row[inside][~zero], before[inside][~zero])
    assert out[~real].isnan().all()


@given(batches(), seeds, st.floats(0, 1))
def test_feature_mask_zeroes_the_same_features_at_all_real_steps(batch, seed, q):
    x, lengths, padding = batch
    out = FeatureMask(q, p=1)(x, lengths, seed=seed, padding=padding)
    real = real_steps(x, lengths, padding)
    for row, inside in zip(out, real, strict=True):
        if inside.any():
            zero = row[inside] == 0
            assert (zero == zero[:1]).all()
            assert int(zero[0].sum()) == masked_count(q, x.shape[2])
    assert out[~real].isnan().all()


@given(batches(), seeds)
def test_order_of_a_chain_matters_as_composition_does(batch, seed):
    """Masking after SeqAug zeroes whole steps; SeqAug after masking scatters the zeros."""
    x, lengths, padding = batch
    out = Chain([SeqAug(1.0, p=1, spread=0), TimeMask(0.5, p=1)])(x, lengths, seed=seed, padding=padding)
    for row, inside in zip(out, real_steps(x, lengths, padding), strict=True):
        zero = row[inside] == 0
        assert (zero == zero[:, :1]).all()


def test_chain_equals_its_plan_carried_out_by_hand():
    x, lengths = torch.randn(6, 9, 8), torch.tensor([9, 4, 1, 0, 7, 9])
    plan = Chain([SeqAug(0.5, p=1), TimeMask(0.3, p=1), FeatureMask(0.2, p=1)]).draw(x, lengths, seed=4)
    resample, steps, features = plan.steps()
    expected = x.clone()
    for b, n in enumerate(lengths.tolist()):
        chosen = resample["features"][b]
        expected[b, :n, chosen] = x[b, resample["order"][b, :n]][:, chosen]
        expected[b, :n][steps["masked_steps"][b, :n]] = 0
        expected[b, :n, features["masked_features"][b]] = 0
    assert torch.equal(plan.apply(x), expected)


def test_permutations_are_uniform():
    # Chi-square over all 24 orders of 4 steps, 24,000 draws; a right generator fails with probability 1e-4.
    plan = SeqAug(1.0, p=1).draw(torch.zeros(24_000, 4, 1), seed=1)
    (step,) = plan.steps()
    codes = (step["order"] * torch.tensor([64, 16, 4, 1])).sum(1)
    orders = {
        sum(v * w for v, w in zip(p, (64, 16, 4, 1), strict=True)) for p in itertools.permutations(range(4))
    }
    values, counts = codes.unique(return_counts=True)
    assert set(values.tolist()) == orders
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_masked_subsets_are_uniform():
    # All 10 pairs of 5 steps, 20,000 draws; a right generator fails with probability 1e-4.
    plan = TimeMask(0.4, p=1).draw(torch.zeros(20_000, 5, 1), seed=2)
    (step,) = plan.steps()
    codes = (step["masked_steps"].long() * torch.tensor([16, 8, 4, 2, 1])).sum(1)
    values, counts = codes.unique(return_counts=True)
    assert len(values) == 10
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def binomial_close(successes, trials, p):
    """A right generator fails with probability 1e-5."""
    return stats.binomtest(int(successes), int(trials), p).pvalue > 1e-5


def test_rates_of_features_masks_gates_and_coins():
    x = {"text": torch.zeros(2000, 20, 300), "audio": torch.zeros(2000, 20, 74)}
    plan = SeqAug({"text": 0.15, "audio": 0.1}, p=1, spread=0, p_t=0.3).draw(x, seed=3)
    for step, alpha in zip(plan.steps(), (0.15, 0.1), strict=True):
        assert binomial_close(step["features"].sum(), step["features"].numel(), alpha)
        assert binomial_close(step["gate"].sum(), step["gate"].numel(), 0.3)
    (mask, _) = TimeMask(0.7, p=1, bernoulli=True).draw(x, seed=4).steps()
    assert binomial_close(mask["masked_steps"].sum(), mask["masked_steps"].numel(), 0.7)
    (coin, other) = TimeMask(0.7, p=0.6, apply="sample").draw(x, seed=5).steps()
    assert binomial_close(coin["fired"].sum(), 2000, 0.6)
    # Coins of different modalities are independent.
    assert binomial_close((coin["fired"] & other["fired"]).sum(), 2000, 0.36)


def test_alpha_has_the_half_normal_spread():
    # 2000 samples x 1000 features: the share of selected features is alpha + |N(0, s^2)| per sample. Its mean
    # a + s sqrt(2 / pi) is known to 5 standard errors (binomial and half-normal parts added).
    a, s, features, batch = 0.15, 0.05, 1000, 2000
    (step,) = SeqAug(a, p=1, spread=s).draw(torch.zeros(batch, 1, features), seed=6).steps()
    share = step["features"].double().mean(1)
    error = math.sqrt((a * (1 - a) / features + s**2 * (1 - 2 / math.pi)) / batch)
    assert abs(share.mean() - a - s * math.sqrt(2 / math.pi)) < 5 * error
    # Beyond the binomial noise there is spread: the variance is the sum of both.
    expected = s**2 * (1 - 2 / math.pi) + (a + 0.04) * (1 - a - 0.04) / features
    assert share.var() == pytest.approx(expected, rel=0.15)


def test_alpha_is_clipped_to_one():
    (step,) = SeqAug(0.9, p=1, spread=5.0, count="exact").draw(torch.zeros(500, 1, 100), seed=1).steps()
    assert int(step["features"].sum(1).max()) == 100


@pytest.mark.parametrize(
    "apply, distinct", [("batch", {(1, 1), (0, 0)}), ("modality", set(itertools.product((0, 1), (0, 1))))]
)
def test_coins_of_batch_and_modality(apply, distinct):
    x = {"text": torch.zeros(3, 4, 2), "audio": torch.zeros(3, 4, 2)}
    seen = set()
    for seed in range(40):
        text, audio = TimeMask(0.5, p=0.5, apply=apply).draw(x, seed=seed).steps()
        for fired in (text["fired"], audio["fired"]):
            assert fired.all() or not fired.any()
        seen.add((int(text["fired"][0]), int(audio["fired"][0])))
    assert seen == distinct


def test_shared_permutation_moves_modalities_together():
    x = {"text": torch.zeros(5, 8, 3), "audio": torch.zeros(5, 8, 2)}
    text, audio = SeqAug(0.5, p=1, shared_permutation=True).draw(x, seed=1).steps()
    assert torch.equal(text["order"], audio["order"])
    text, audio = SeqAug(0.5, p=1).draw(x, seed=1).steps()
    assert not torch.equal(text["order"], audio["order"])


def test_noise_moments_and_independence_of_views():
    x = torch.zeros(40, 50, 100)
    a, b = TwoViews(GaussianNoise(0.3, p=1, mu=0.5))(x, seed=1)
    n = x.numel()
    for view in (a, b):
        assert abs(view.double().mean() - 0.5) < 5 * 0.3 / math.sqrt(n)
        assert view.double().std() == pytest.approx(0.3, abs=5 * 0.3 / math.sqrt(2 * n))
    correlation = ((a - 0.5) * (b - 0.5)).double().mean() / 0.09
    assert abs(correlation) < 5 / math.sqrt(n)


def example():
    x = {"text": torch.randn(7, 12, 30), "audio": torch.randn(7, 12, 8), "visual": torch.randn(7, 9, 5)}
    lengths = {
        "text": torch.tensor([12, 3, 0, 1, 7, 8, 12]),
        "audio": torch.tensor([12, 3, 0, 1, 7, 8, 12]),
        "visual": torch.tensor([9, 3, 5, 1, 7, 0, 2]),
    }
    views = TwoViews(
        [GaussianNoise(), SeqAug(ALPHA), TimeMask()], [SeqAug(ALPHA, apply="sample"), FeatureMask(0.2)]
    )
    return x, lengths, views


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert list(a) == list(b)
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_seeds_and_generators_reproduce():
    x, lengths, views = example()
    assert_same(views(x, lengths, seed=9), views(x, lengths, seed=torch.tensor([9])))
    first = views(x, lengths, generator=torch.Generator().manual_seed(3))
    assert_same(first, views(x, lengths, generator=torch.Generator().manual_seed(3)))
    torch.manual_seed(5)
    default = views(x, lengths)
    torch.manual_seed(5)
    assert_same(default, views(x, lengths))
    assert not torch.equal(default[0]["text"], views(x, lengths)[0]["text"])


def test_one_tensor_of_lengths_serves_all_modalities():
    x, _, _ = example()
    x = {name: x[name] for name in ("text", "audio")}
    n = torch.tensor([12, 3, 0, 1, 7, 8, 12], dtype=torch.int32)
    chain = Chain([SeqAug(0.5, p=1), GaussianNoise(p=1)])
    assert_same([chain(x, n, seed=1)], [chain(x, {"text": n, "audio": n}, seed=1)])


def test_eval_changes_nothing():
    x, lengths, views = example()
    a, b = views.eval()(x, lengths)
    assert_same([a, b], [x, x])
    assert SeqAug(1.0, p=1).eval()(x["text"]) is x["text"]


def storages(*values):
    tensors = [t for v in values for t in (v.values() if isinstance(v, dict) else [v])]
    return [t.untyped_storage().data_ptr() for t in tensors]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("steps", [[], [SeqAug(1.0, p=0)], [TimeMask(p=1), SeqAug(0.0, p=1)]], ids=len)
def test_no_view_shares_memory_with_another_or_the_input(native, steps, name, training):
    """Work in place on one view reached the other and the input in eval mode; none does, whatever fires."""
    x = {"text": torch.randn(2, 5, 3, requires_grad=True), "audio": torch.randn(2, 4, 6).transpose(0, 1)[:2]}
    one = x["text"]
    with mmfast.backend(name):
        for values in (x, one):
            a, b = TwoViews(steps).train(training)(values)
            assert len(set(storages(values, a, b))) == 3 * len(storages(values))
            assert all(
                t.is_contiguous() for v in (a, b) for t in (v.values() if isinstance(v, dict) else [v])
            )
        (gradient,) = torch.autograd.grad((a + 2 * b).sum(), one)
        assert len(set(storages(one, Chain(steps)(one)))) == 2
    if not training:
        assert torch.equal(gradient, torch.full_like(one, 3))


def test_plan_is_saved_replayed_and_printed(tmp_path):
    x, lengths, views = example()
    for padding in ("back", "front"):
        plan = views.draw(x, lengths, seed=8, padding=padding, ids=torch.arange(7) * 3)
        expected = views(x, lengths, seed=8, padding=padding, ids=torch.arange(7) * 3)
        assert_same(plan.apply(x), expected)
        torch.save(plan.state_dict(), tmp_path / "plan.pt")
        again = Plan.from_state_dict(torch.load(tmp_path / "plan.pt", weights_only=True))
        assert_same(again.apply(x), expected)
        text = str(again)
        assert "seed 8" in text and "view 1 step 0 visual: resample, fired in" in text


def test_damaged_plans_are_refused():
    x, lengths, views = example()
    state = views.draw(x, lengths, seed=8).state_dict()
    with pytest.raises(ValueError, match=r"words must be int32 of shape \(7, \d+\)"):
        Plan.from_state_dict(state | {"words": state["words"][:, :-1]})
    with pytest.raises(ValueError, match="order of view 0 step 1 must stay within the real time steps, got"):
        Plan.from_state_dict(state | {"words": torch.full_like(state["words"], 1000)})
    for change, message in [
        ({"ids": torch.tensor([1, 2])}, r"ids must be int64 of shape \(7,\), got int64 of shape \(2,\)"),
        ({"seed": torch.tensor(8)}, r"seed must be int64 of shape \(1,\), got int64 of shape \(\)"),
        ({"lengths": [n.int() for n in state["lengths"]]}, "lengths of 'text' must be int64 of .* got int32"),
        (
            {"lengths": [None, None, lengths["visual"] + 1]},
            r"lengths of 'visual' must be in \[0, 9\], got 10",
        ),
    ]:
        with pytest.raises(ValueError, match=f"^Plan: {message}"):
            Plan.from_state_dict(state | change)
    plan = Plan.from_state_dict(state)
    with pytest.raises(ValueError, match="values must have the batch size"):
        plan.apply({name: v[:3] for name, v in x.items()})


def test_gradients_flow_through_the_modules():
    x, lengths, views = example()
    leaves = {name: v.double().requires_grad_() for name, v in x.items()}
    a, b = views(leaves, lengths, seed=2)
    (sum((v**2).sum() for v in a.values()) + sum(v.sum() for v in b.values())).backward()
    eps = 1e-6
    with torch.no_grad():
        moved = {name: v + eps * torch.ones_like(v) for name, v in leaves.items()}
        a2, b2 = views(moved, lengths, seed=2)
        change = sum((a2[k] ** 2).sum() - (a[k] ** 2).sum() + (b2[k] - b[k]).sum() for k in a)
    assert sum(v.grad.sum() for v in leaves.values()) == pytest.approx(float(change / eps), rel=1e-4)


def test_compiles_in_full_graph():
    x, lengths, views = example()
    compiled = torch.compile(lambda x, n, seed: views(x, n, seed=seed), fullgraph=True)
    for seed in (1, 2):
        assert_same(compiled(x, lengths, torch.tensor([seed])), views(x, lengths, seed=seed))
    fresh = torch.compile(SeqAug(1.0, p=1), fullgraph=True, backend="aot_eager")
    assert not torch.equal(fresh(x["text"]), fresh(x["text"]))


@pytest.mark.parametrize("given_lengths", [True, False])
def test_compiled_gradients(given_lengths):
    x, lengths, views = example()

    def loss(x, seed):
        a, b = views(x, lengths if given_lengths else None, seed=seed)
        return sum((a[k] ** 2).sum() + (3 * b[k]).sum() for k in a)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = {name: v.clone().requires_grad_() for name, v in x.items()}
        function(leaves, torch.tensor([2])).backward()
        results.append({name: v.grad for name, v in leaves.items()})
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad)


def test_forked_workers_can_augment():
    """A kernel that ran on several threads must not hang in a process forked afterwards (DataLoader workers)."""
    chain = Chain([GaussianNoise(p=1)])
    chain(torch.randn(64, 50, 100))

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return chain(torch.zeros(64, 50, 100), seed=i)

    loader = torch.utils.data.DataLoader(Data(), batch_size=None, num_workers=2, timeout=60)
    for i, item in enumerate(loader):
        assert torch.equal(item, chain(torch.zeros(64, 50, 100), seed=i))


def test_public_names():
    assert {"SeqAug", "TimeMask", "FeatureMask", "GaussianNoise", "Chain", "TwoViews", "Plan"} <= set(
        mmfast.__all__
    )
