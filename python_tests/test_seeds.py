"""Seeds outside augmentation: any 64 bits, wrapped as torch does; anything else is refused by name."""

import numpy as np
import pytest
import torch

from mmfast.data import BucketSampler, MultimodalDataset, folds, label_share, make_loader, synthetic
from mmfast.metrics import bootstrap_interval, mae
from mmfast.training.seeds import derive

DATA = MultimodalDataset.from_padded(
    {"text": torch.randn(40, 3, 2, device="cpu")},
    {"text": torch.arange(40) % 3 + 1},
    labels=torch.linspace(-1, 1, 40),
)

# What each of them makes of a seed, as something that can be compared.
USERS = {
    "synthetic": lambda seed: (
        synthetic(12, seed=seed, max_length=3, features={"text": 1}).train.flat("text").tolist()
    ),
    "label_share": lambda seed: label_share(DATA, 0.3, seed).labels.isnan().tolist(),
    "folds": lambda seed: [fold.test.ids.tolist() for fold in folds(DATA, 3, seed)],
    "bootstrap_interval": lambda seed: bootstrap_interval(
        mae, np.arange(9.0), np.arange(9.0) ** 2, n=20, seed=seed
    ),
    "BucketSampler": lambda seed: BucketSampler(DATA, 4, seed=seed).batches(1),
    "make_loader": lambda seed: make_loader(DATA, 4, True, False, seed).batch_sampler.batches(3),
    "derive": lambda seed: derive(seed, "derive", 1),
}


@pytest.mark.parametrize("name", USERS)
def test_seeds_wrap_at_64_bits(name):
    use = USERS[name]
    for seed, same in [
        (-1, 2**64 - 1),
        (2**63, -(2**63)),
        (np.uint64(2**63 + 9), -(2**63) + 9),
        (7, np.int64(7)),
    ]:
        assert use(seed) == use(same)
    # PyTorch's generators on the CPU, which order the batches, tell 2^32 seeds apart.
    assert use(-1) != use(1) and (use(2**63) != use(0) or name in ("BucketSampler", "make_loader"))


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("seed", [1.9, "1", True, None, 2**64])
def test_what_is_no_seed_is_refused_by_name(name, seed):
    op = "BucketSampler" if name == "make_loader" else name
    rule = "have 64 bits at most" if seed == 2**64 else "be an integer"
    with pytest.raises((TypeError, ValueError), match=f"^{op}: seed must {rule}, got {seed!r}$"):
        USERS[name](seed)
