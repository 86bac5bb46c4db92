"""A small flow twin of the toy world with random weights: its own text encoders and VAE."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lit_prefopt.toy.assemble_flow import assemble_flow, new_transformer
from tests.helpers.tiny_sd3 import SD35

SHIPPED = Path(__file__).parents[2] / "configs" / "toy" / "flow.json"
SMALLER = {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 64}


def tiny_toy_flow(folder: Path) -> Path:
    """Write a pipeline with two blocks of the shipped width, one with a second attention.

    An untrained transformer predicts 0 with blocks that are the identity, so that most gradients
    are zero; here all weights are random.
    """
    folder.mkdir(parents=True)
    config = json.loads(SHIPPED.read_text()) | SMALLER | SD35
    (folder / "flow.json").write_text(json.dumps(config))
    network = new_transformer(folder / "flow.json")
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=draw))
    network.save_pretrained(folder / "transformer")
    assemble_flow(str(folder / "transformer"), output=str(folder / "pipeline"))
    return folder / "pipeline"


def flow_twin(folder: str) -> list[str]:
    """Return the arguments that name it as a run's backbone.

    The check of the base is off: a transformer that was not trained predicts no velocity.
    """
    return [
        *("--backbone", "ToyFlow", "--backbone.pretrained", folder),
        *("--model.check_base", "false"),
    ]
