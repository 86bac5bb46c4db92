"""Distributed strategies that shard weights, gradients or optimizer states: FSDP2 and ZeRO."""

from typing import TYPE_CHECKING

from lit_prefopt.lazy import lazy_names

if TYPE_CHECKING:
    from lit_prefopt.strategies.full_state import FullStateStrategy
    from lit_prefopt.strategies.fully_sharded import FullySharded
    from lit_prefopt.strategies.zero import ZeRO

__all__ = ["FullySharded", "FullStateStrategy", "ZeRO"]

__getattr__, __dir__ = lazy_names(__name__)
