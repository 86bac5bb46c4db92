"""Reject Lightning's strategies under which training would be incorrect."""

from __future__ import annotations

from lit_prefopt.errors import InputError

CURES = {
    "deepspeed": (
        "trains what mixed precision should keep in float32 in bf16, and divides gradients twice "
        "by `accumulate_grad_batches`: use `--trainer hardware/zero2.yaml` (or zero3, "
        "zero3-offload), which does neither"
    ),
    "fsdp": (
        "needs one precision and one `requires_grad` for all weights of a shard, but here frozen "
        "and trained weights are mixed: use `--trainer hardware/fsdp.yaml`, which is FSDP2"
    ),
    "modelparallel": (
        "does not define what is sharded: use `--trainer hardware/fsdp.yaml`, which is FSDP2"
    ),
}


def check_strategy(name: str) -> None:
    """Raise InputError for a strategy that this library replaces.

    Args:
        name: Its registered name, such as `deepspeed_stage_2`, or the name of its class.

    Raises:
        InputError: The name has one of these prefixes.
    """
    for beginning, why in CURES.items():
        if name.lower().startswith(beginning):
            raise InputError(f"The strategy {name} {why}.")
