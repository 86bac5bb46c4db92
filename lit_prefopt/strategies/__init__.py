"""How the weights lie on several devices: whole on each (Lightning's DDP), or in shards."""

from lit_prefopt.strategies.full_state import FullStateStrategy
from lit_prefopt.strategies.fully_sharded import FullySharded
from lit_prefopt.strategies.zero import ZeRO

__all__ = ["FullySharded", "FullStateStrategy", "ZeRO"]
