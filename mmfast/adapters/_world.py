"""What losses over several processes have in common."""

import torch.distributed as dist

from mmfast.errors import UserError


def one_process(op: str) -> None:
    """Refuses to compute per process what the project computes over all of them."""
    if dist.is_available() and dist.is_initialized() and (size := dist.get_world_size()) > 1:
        raise UserError(
            f"{op}: the process group must have one process, for statistics over several are not implemented yet, "
            f"got {size}"
        )
