"""Schedulers that are not a flow's, and those of a flow that contradict themselves."""

from __future__ import annotations

import json
from typing import Any

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from lit_prefopt.errors import InputError
from lit_prefopt.processes.discrete import DiscreteProcess
from lit_prefopt.processes.flow_schedule import FLOW_SCHEDULERS
from lit_prefopt.processes.rectified_flow import RectifiedFlow
from lit_prefopt.processes.schedule import DDPM_SCHEDULERS

EULER = "FlowMatchEulerDiscreteScheduler"


def test_a_flows_own_configuration_is_taken() -> None:
    config = json.loads(FlowMatchEulerDiscreteScheduler(shift=3.0).to_json_string())
    assert config["_class_name"] in FLOW_SCHEDULERS
    assert RectifiedFlow(config).shift((16, 8, 8)) == 3
    assert RectifiedFlow({"shift": 2.0}).shift((16, 8, 8)) == 2  # some files have no class


@pytest.mark.parametrize("kind", [*sorted(DDPM_SCHEDULERS), "FlowMatchHeunDiscreteScheduler", "X"])
def test_other_schedulers_are_refused(kind: str) -> None:
    with pytest.raises(InputError, match=f"is a {kind}, whose noise process is not that of a rect"):
        RectifiedFlow({"_class_name": kind})


def test_a_flows_scheduler_is_no_ddpms() -> None:
    fields = dict(FlowMatchEulerDiscreteScheduler().config)
    with pytest.raises(InputError, match=f"is a {EULER}, whose noise process is not known"):
        DiscreteProcess({"_class_name": EULER, **fields})
    with pytest.raises(InputError, match=r"has shift 1.0, so its noise process is not DDPM's"):
        DiscreteProcess(fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"beta_schedule": "linear"}, "has beta_schedule 'linear', a field of DDPM's"),
        ({"prediction_type": "epsilon"}, "remove prediction_type from its scheduler_config.json"),
        ({"invert_sigmas": True}, "invert_sigmas, so its levels run from image to noise"),
        ({"stochastic_sampling": True}, "stochastic_sampling, so its sampler adds noise"),
        ({"num_train_timesteps": 500}, "has 500 timesteps, and flows have 1000"),
        ({"shift": 0.0}, "shift is 0.0; give a number above 0"),
        ({"shift": "much"}, "noise levels of the scheduler's configuration cannot be computed"),
        ({"time_shift_type": "cubic"}, "correct its shift, shift_terminal, time_shift_type"),
        (
            {"use_karras_sigmas": True, "use_exponential_sigmas": True},
            "cannot be computed .*Only one of",
        ),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting, a shift by the resolution"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as error:
        RectifiedFlow({"_class_name": EULER, **fields})
    assert "\n" not in str(error.value)
