"""What every encoder is: modality -> (B, L, F) to one fused vector a sample, in two halves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mmfast.checks import check_integer, told
from mmfast.errors import UserError
from mmfast.models.layers.lengths import back_padded, check_lengths, check_values, zero_padding


class Steps(NamedTuple):
    """Back-padded sequences of one modality.

    Attributes:
        values: (B, L, H).
        lengths: (B,) int64, in [0, L]; 0 where a sample lacks the modality.
    """

    values: Tensor
    lengths: Tensor


class Encoder(nn.Module):
    """Base class of encoders: ``forward = fuse(encode(...))``.

    A subclass calls ``super().__init__(features)``, sets ``out_features``, and writes :meth:`encode` and
    :meth:`fuse`. It promises what the published ones keep: a sample's vector depends neither on its padding
    (amount, side or content, NaN included) nor on the other samples in evaluation mode; a missing modality
    (length 0) is no error; gradients are finite. :meth:`steps` and :meth:`leave_out` do the common part of both
    halves, checks included.

    Args:
        features: modality -> F. Names are Python identifiers; their order is the order of concatenation.

    Attributes:
        features: as given.
        out_features: size of the fused vector, set by the subclass.
        aligned: whether all modalities that a sample has must be of one length.
        modalities: least and greatest number of modalities; None for any.

    Raises:
        UserError: no modality, too few or too many of them, a name that no module can have, a size below 1.
    """

    aligned: ClassVar[bool] = False
    modalities: ClassVar[tuple[int, int | None]] = (1, None)
    features: dict[str, int]
    out_features: int

    def __init__(self, features: dict[str, int]):
        super().__init__()
        self._check_features(features)
        self.features = dict(features)

    def encode(
        self, values: Mapping[str, Tensor], lengths: Mapping[str, Tensor], padding: str = "back"
    ) -> dict[str, Any]:
        """Modality -> what is known of it before the modalities meet: :class:`Steps`, or vectors (B, H).

        Args:
            values: modality -> (B, L_m, F_m) floating point, in the encoder's dtype unless autocast is on.
                L_m may differ: each modality is padded for itself.
            lengths: modality -> (B,) int64 or int32, each in [0, L_m]; 0 where a sample lacks the modality.
            padding: ``"back"`` or ``"front"``, where the padding is.
        """
        raise NotImplementedError

    def fuse(self, representations: Mapping[str, Any], without: Collection[str] = ()) -> Tensor:
        """Fused vectors (B, ``out_features``).

        Args:
            representations: what :meth:`encode` returned.
            without: modalities to leave out, as if every sample lacked them.
        """
        raise NotImplementedError

    def vectors(self, representations: Mapping[str, Any]) -> dict[str, Tensor]:
        """Modality -> one vector a sample (B, H), zero where it lacks the modality.

        The mean over real steps of :class:`Steps`; vectors (B, H) are handed on as they are.
        """
        return {name: self._vector(name, representations[name]) for name in self.features}

    def auxiliary(self, representations: Mapping[str, Any]) -> dict[str, Tensor]:
        """Name -> scalar loss term that this encoder adds to whatever it is trained on; none by default."""
        return {}

    def forward(
        self, values: Mapping[str, Tensor], lengths: Mapping[str, Tensor], padding: str = "back"
    ) -> Tensor:
        """Fused vectors (B, ``out_features``); arguments as for :meth:`encode`."""
        return self.fuse(self.encode(values, lengths, padding))

    def steps(
        self, values: Mapping[str, Tensor], lengths: Mapping[str, Tensor], padding: str = "back"
    ) -> dict[str, Steps]:
        """The checked batch, back-padded, with zeros at padded steps and ``lengths`` as int64 beside the values.

        Arguments as for :meth:`encode`. Each modality has as many steps as its longest sample, or all have as many
        as the longest of any where the encoder needs them ``aligned``; one at least, for an LSTM needs a step.

        Raises:
            UserError, TypeError: other names, shapes or dtypes; an empty batch; lengths outside [0, L_m]; where the
                encoder is ``aligned``, unequal non-zero lengths within a sample. Under ``torch.compile`` the caller
                answers for the lengths' values: nothing looks at them.
        """
        op = type(self).__name__
        check_values(op, self.features, values, lengths, padding)
        self._check_dtype(next(iter(values.values())))
        if torch.compiler.is_compiling():
            longest = {name: values[name].shape[1] for name in self.features}
        else:
            longest = check_lengths(op, values, lengths, self.aligned)
        if self.aligned:
            longest = dict.fromkeys(longest, max(longest.values()))
        n = {name: lengths[name].to(values[name].device, torch.int64) for name in self.features}
        return {
            name: Steps(back_padded(values[name], n[name], max(longest[name], 1), padding), n[name])
            for name in self.features
        }

    def leave_out(self, representations: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
        """``representations`` in the order of ``features``, those of ``without`` zero and of length 0.

        Zeros still hang on the parameters, whose gradients are zero and not absent: processes that add gradients
        would wait for them.
        """
        op = type(self).__name__
        if isinstance(without, str):
            raise TypeError(f"{op}: without must be a collection of modalities, got {without!r}")
        for name in without:
            if name not in self.features:
                raise UserError(f"{op}: without must be among {', '.join(self.features)}, got {name!r}")
        return {
            name: self._emptied(representations[name]) if name in without else representations[name]
            for name in self.features
        }

    def _emptied(self, representation: Any) -> Any:
        if isinstance(representation, tuple):
            emptied = map(self._emptied, representation)
            return type(representation)(*emptied) if hasattr(representation, "_fields") else tuple(emptied)
        if isinstance(representation, Tensor):
            everywhere = torch.ones((), dtype=torch.bool, device=representation.device)
            return representation.masked_fill(everywhere, 0)
        raise TypeError(
            f"{type(self).__name__}: only representations of tensors and tuples of them can be left out, got "
            f"{told(representation)}"
        )

    def _vector(self, name: str, representation: Any) -> Tensor:
        if isinstance(representation, Steps):
            total = zero_padding(*representation).sum(dim=1)
            return total / representation.lengths.clamp(min=1)[:, None]
        if isinstance(representation, Tensor) and representation.dim() == 2:
            return representation
        raise TypeError(
            f"{type(self).__name__}: the representation of {name} must be Steps or a tensor (B, H), unless the class "
            f"has vectors of its own, got {told(representation)}"
        )

    def _check_dtype(self, x: Tensor) -> None:
        dtype = next((p.dtype for p in self.parameters()), x.dtype)
        casts = x.is_floating_point() and torch.is_autocast_enabled(x.device.type)
        if x.dtype != dtype and not casts:
            raise TypeError(
                f"{type(self).__name__}: values must have the encoder's dtype, {dtype}, got {x.dtype}"
            )

    def _check_features(self, features: Mapping[str, int]) -> None:
        op = type(self).__name__
        least, most = self.modalities
        if not features:
            raise UserError(f"{op}: features must name at least one modality, got none")
        if len(features) < least or (most is not None and len(features) > most):
            rule = (
                f"at least {least}" if most is None else f"{least} to {most}" if least < most else f"{least}"
            )
            raise UserError(
                f"{op}: features must name {rule} modalities, got {', '.join(map(str, features))}"
            )
        for name, size in features.items():
            # Names become attributes of modules and parts of parameter names.
            if not (isinstance(name, str) and name.isidentifier()) or hasattr(nn.ModuleDict(), name):
                raise UserError(f"{op}: modality {name!r} must be an identifier and no attribute of a module")
            check_integer(op, f"features of {name}", size, 1)
