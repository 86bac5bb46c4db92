"""Run by torchrun: every rank runs several command lines, one after the other.

torchrun --nproc-per-node 2 -m tests.helpers.two_ranks_commands FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from lit_prefopt.cli import main
from tests.helpers import strategies_cpu  # noqa: F401 - DeepSpeed reads the accelerator when imported

if __name__ == "__main__":
    torch.set_num_threads(1)
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        main(arguments)
