"""``from lightly.loss import BarlowTwinsLoss`` and the like: the same names from ``mmfast.adapters.lightly``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast.checks import check_bool, check_integer, check_number, told
from mmfast.errors import UserError
from mmfast.losses import vicreg
from mmfast.losses.barlow_twins import Options, TwoViewLoss, evaluate_barlow_twins
from mmfast.losses.contrastive import _nt_xent, _positions, check_two_views
from mmfast.losses.pairs import evaluate_pairs
from mmfast.losses.queue import NO_QUEUE, EmbeddingQueue
from mmfast.losses.similarity import Call, SimilarityLoss, Variant, among_themselves
from mmfast.ops.similarity.rows import joined, unit_rows
from mmfast.ops.similarity.shared import Sharing

OP = "lightly.BarlowTwinsLoss"
NT_XENT = "lightly.NTXentLoss"
VICREG = "lightly.VICRegLoss"
NAMES = ("out0", "out1")


def _check_gathering(op: str, gather_distributed: bool) -> None:
    if gather_distributed and not dist.is_available():
        raise UserError(f"{op}: gather_distributed must be False without torch.distributed, got True")


class BarlowTwinsLoss(TwoViewLoss):
    """lightly's Barlow Twins loss; ``last`` are the components of the latest call.

    ``gather_distributed`` takes the mean of C over the processes, each with the statistics of its own rows.

    Raises:
        UserError: ``gather_distributed`` where PyTorch comes without torch.distributed.
    """

    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False):
        super().__init__()
        self.lambda_param = check_number(OP, "lambda_param", lambda_param, 0)
        self.gather_distributed = check_bool(OP, "gather_distributed", gather_distributed)
        _check_gathering(OP, self.gather_distributed)

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of two views' embeddings (B, D)."""
        stats = "local" if self.gather_distributed else None
        options = Options(self.lambda_param, variant="lightly", stats=stats)
        return self._kept(*evaluate_barlow_twins(z_a, z_b, options.request(), op=OP))


def _bank(size: Any) -> EmbeddingQueue | None:
    if size == 0 and not isinstance(size, bool):
        return None
    if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
        raise UserError(f"{NT_XENT}: memory_bank_size must be 0 or (rows, columns), got {told(size)}")
    size = [check_integer(NT_XENT, f"memory_bank_size[{i}]", x, 1) for i, x in enumerate(size)]
    bank = EmbeddingQueue(*size)
    bank.enqueue(torch.randn(size, device=bank.rows.device))
    return bank


class NTXentLoss(SimilarityLoss):
    """lightly's NT-Xent loss of two views; ``last`` are the components of the latest call.

    ``memory_bank_size`` (rows, columns): ``out0`` stands against its row of ``out1`` and those of the bank, at first
    random ones, alone; the bank takes ``out1`` after the loss if ``out0`` requires a gradient, and is in
    ``state_dict()``. ``gather_distributed``: the loss is that of the rows of all processes, on each process; with a
    bank that takes them all, and the loss is that of each process.

    Raises:
        UserError: a temperature that is not above 0; ``gather_distributed`` where PyTorch comes without
            torch.distributed.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ):
        super().__init__()
        temperature = check_number(NT_XENT, "temperature", temperature, 0, ends="(]")
        gather_distributed = check_bool(NT_XENT, "gather_distributed", gather_distributed)
        _check_gathering(NT_XENT, gather_distributed)
        self._take(temperature=temperature, gather_distributed=gather_distributed)
        self.bank = _bank(memory_bank_size)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views' embeddings (B, D)."""
        check_two_views(NT_XENT, NAMES, out0, out1)
        sharing = "global" if self.gather_distributed else None, "true", None
        if self.bank is not None:
            return self._against_bank(out0, out1, Sharing(NT_XENT, *sharing))
        sharing = Sharing(NT_XENT, *sharing)
        call = Call(NT_XENT, "mean", "anchors", sharing).of({"out0": out0, "out1": out1})
        place = _positions(sharing, len(out0), out0.device)
        vectors = [None, torch.cat((place, place)), None, None]
        z = joined(out0, out1)
        scale = call.scale(self.temperature, ("out0", out0))
        return self._kept(among_themselves(call, z, vectors, scale, Variant("out"), True))

    def _against_bank(self, out0: Tensor, out1: Tensor, sharing: Sharing) -> Tensor:
        # Of one id: nobody is another's negative in the batch.
        ids = torch.zeros(len(out0), dtype=torch.int64, device=out0.device)
        feeding = self.bank, None, False
        options = {"temperature": self.temperature, "ids": ids, "feeding": feeding}
        found = evaluate_pairs(NT_XENT, out0, out1, views={"out0": out0, "out1": out1}, **options)
        if out0.requires_grad:
            (every,), _ = sharing.gather([out1.detach()], [], {})
            self.bank.enqueue(every)
        return self._kept(found)


class DCLLoss(SimilarityLoss):
    """lightly's decoupled contrastive loss, :func:`mmfast.functional.nt_xent` of variant "dcl".

    ``weight_fn`` of both views' rows, divided by their lengths, gives (B,) weights of the positive pairs, which are
    not differentiated. ``gather_distributed`` takes the loss of the rows of all processes, and is refused with
    ``weight_fn``.
    """

    _op = "lightly.DCLLoss"

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ):
        super().__init__()
        self.weight_fn = weight_fn
        temperature = check_number(self._op, "temperature", temperature, 0, ends="(]")
        gather_distributed = check_bool(self._op, "gather_distributed", gather_distributed)
        _check_gathering(self._op, gather_distributed)
        if gather_distributed and weight_fn is not None:
            raise UserError(f"{self._op}: gather_distributed must be False with weights of pairs, got True")
        self._take(temperature=temperature, gather_distributed=gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views' embeddings (B, D)."""
        check_two_views(self._op, NAMES, out0, out1)
        sharing = "global" if self.gather_distributed else None, "true", None
        options = None, None, None, None, True, "dcl", "mean", None, sharing, NO_QUEUE, self._op, NAMES
        loss, components, compared = _nt_xent(out0, out1, self.temperature, *options)
        if self.weight_fn is not None:
            a, b = (unit_rows(z, True) for z in (out0, out1))
            one, other = (self._weights(*pair) for pair in ((a, b), (b, a)))
            loss = loss + ((1 - (one + other) / 2) * (a * b).sum(1)).mean() / self.temperature
            components = torch.cat((loss.detach()[None], components[1:]))
        return self._kept((loss, components, compared))

    def _weights(self, a: Tensor, b: Tensor) -> Tensor:
        weights = self.weight_fn(a, b)
        if not isinstance(weights, Tensor) or weights.shape not in ((), (len(a),)):
            found = tuple(weights.shape) if isinstance(weights, Tensor) else told(weights)
            raise UserError(f"{self._op}: weight_fn must give a tensor ({len(a)},), got {found}")
        return weights.detach()


class DCLWLoss(DCLLoss):
    """lightly's weighted decoupled contrastive loss: pairs that are alike weigh less.

    The weights are 2 - B softmax(cosine / sigma), of which lightly's authors say von Mises-Fisher.
    """

    _op = "lightly.DCLWLoss"

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False):
        sigma = check_number(self._op, "sigma", sigma, 0, ends="(]")

        def weights(a: Tensor, b: Tensor) -> Tensor:
            return 2 - len(a) * ((a * b).sum(1) / sigma).softmax(0)

        super().__init__(temperature, weights, gather_distributed)
        self._take(sigma=sigma)


class VICRegLoss(vicreg.KeepsVICReg):
    """lightly's VICReg loss; ``last`` are the components of the latest call.

    ``gather_distributed`` takes the loss of the rows of all processes. Its gradients are lightly's; its value has the
    invariance of all rows, where lightly's has that of the process's own.

    Raises:
        UserError: ``gather_distributed`` where PyTorch comes without torch.distributed; embeddings that
            are not (B, D).
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 0.0001,
    ):
        super().__init__()
        self.lambda_param = check_number(VICREG, "lambda_param", lambda_param, 0)
        self.mu_param = check_number(VICREG, "mu_param", mu_param, 0)
        self.nu_param = check_number(VICREG, "nu_param", nu_param, 0)
        self.eps = check_number(VICREG, "eps", eps, 0)
        self.gather_distributed = check_bool(VICREG, "gather_distributed", gather_distributed)
        if self.gather_distributed and not dist.is_available():
            raise UserError(f"{VICREG}: gather_distributed must be False without torch.distributed, got True")

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of two views' embeddings (B, D)."""
        stats = "global" if self.gather_distributed else None
        options = vicreg.Options(self.lambda_param, self.mu_param, self.nu_param, self.eps, stats=stats)
        return self._kept(vicreg.evaluate_vicreg(z_a, z_b, options, op=VICREG))
