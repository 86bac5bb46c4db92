"""How the weights lie on several devices: whole on each (Lightning's DDP), or in shards."""

from typing import TYPE_CHECKING

from lit_prefopt.lazy import lazy_names

if TYPE_CHECKING:
    from lit_prefopt.strategies.fully_sharded import FullySharded
    from lit_prefopt.strategies.whole_states import WholeStates
    from lit_prefopt.strategies.zero import ZeRO

__all__ = ["FullySharded", "WholeStates", "ZeRO"]

__getattr__, __dir__ = lazy_names(__name__)
