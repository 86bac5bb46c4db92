"""Strategies of Lightning's under which these trainings would go wrong."""

from __future__ import annotations

from lit_prefopt.errors import InputError

CURES = {
    "deepspeed": (
        "trains what mixed precision should keep in float32 in bf16, and divides gradients twice "
        "by `accumulate_grad_batches`: take `--trainer hardware/zero2.yaml` (or zero3, "
        "zero3-offload), which does neither"
    ),
    "fsdp": (
        "wants one precision and one `requires_grad` for all weights of a shard, where frozen and "
        "trained ones lie side by side here: take `--trainer hardware/fsdp.yaml`, which is FSDP2"
    ),
    "modelparallel": (
        "leaves open what is sharded: take `--trainer hardware/fsdp.yaml`, which is FSDP2"
    ),
}


def check_strategy(name: str) -> None:
    """Refuse a strategy that has a better one here.

    Args:
        name: Its registered name, such as `deepspeed_stage_2`, or the name of its class.

    Raises:
        InputError: It begins with one of these names.
    """
    for beginning, why in CURES.items():
        if name.lower().startswith(beginning):
            raise InputError(f"The strategy {name} {why}.")
