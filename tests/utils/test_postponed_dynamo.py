"""A process in which torch._dynamo is postponed; each test has one of its own."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from lit_prefopt.utils.postponed_dynamo import KNOWN

START = (
    "import sys; from lit_prefopt.utils.postponed_dynamo import PostponedDynamo, postpone_dynamo\n"
    "postpone_dynamo()\n"
    "import torch, diffusers, lightning.pytorch\n"
    "from diffusers.models import UNet2DConditionModel\n"
    "from diffusers.models.attention import BasicTransformerBlock as Block\n"
    "stand_in = sys.modules['torch._dynamo']\n"
    "assert type(stand_in) is PostponedDynamo, type(stand_in)\n"
    "def real(): return type(sys.modules['torch._dynamo']) is not PostponedDynamo\n"
)
COMPILE = "net = torch.compile(torch.nn.Linear(2, 2), backend='eager'); net(torch.ones(1, 2))\n"


def test_the_installed_torch_is_known() -> None:
    version = importlib.metadata.version("torch")
    assert ".".join(version.split(".")[:2]) in KNOWN, "try its order of imports, then add it"


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "from lightning.pytorch.utilities.compile import OptimizedModule\n"
        "assert not isinstance(torch.nn.Linear(2, 2), OptimizedModule)\n"
        "assert not real()\n"
        f"{COMPILE}"
        "assert real() and isinstance(net, OptimizedModule)\n"
        "assert issubclass(type(net), OptimizedModule)\n",
        "block = [one for how, one in stand_in._marks if how == 'allow_in_graph'][-1]\n"
        f"{COMPILE}"
        "from torch._dynamo import trace_rules\n"
        "assert id(block) in trace_rules._allowed_callable_ids.function_ids\n",
        "mark = stand_in.disable(lambda x: x + 1)\n"
        "assert mark(1) == 2 and not real()\n"
        "def traced(x): return mark(x) * 2\n"
        "compiled = torch.compile(traced, backend='eager', fullgraph=True)\n"
        "assert torch.equal(compiled.__wrapped__(torch.ones(1)), torch.tensor([4.0]))\n"
        "try: compiled(torch.ones(1))\n"
        "except torch._dynamo.exc.Unsupported: pass\n"
        "else: raise SystemExit('a disabled function was traced')\n",
        "import torch._dynamo.config as config\n"
        "assert real() and config is torch._dynamo.config\n"
        "assert config is sys.modules['torch._dynamo.config']\n"
        "assert config.__spec__.origin.endswith('config.py')\n",
        "import torch.nn.attention.flex_attention\n"
        "assert not real()\n"
        "name = '_trace_wrapped_higher_order_op'\n"
        "leaf = sys.modules[f'torch._dynamo.{name}']\n"
        f"{COMPILE}"
        "assert getattr(torch._dynamo, name) is leaf\n",
        "import inspect; inspect.getmodule(print)\n"
        "weight = torch.nn.Parameter(torch.ones(2)); weight.grad = torch.ones(2)\n"
        "torch.optim.AdamW([weight]).step()\n"
        "from torch.utils.checkpoint import checkpoint\n"
        "assert not real()\n"
        "checkpoint(torch.sin, weight, use_reentrant=False).sum().backward()\n",
    ],
    ids=["compiled", "allowed", "disabled", "submodule", "leaf", "step"],
)
def test_what_postponing_changes_nothing_of(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", START + program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
