"""The policies that need no vLLM keep the promises of all policies; a new one joins by a line in `POLICIES`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import LlamaForCausalLM

from agile.policies import HFPolicy, ScriptedPolicy
from agile.protocols import Policy
from agile.types import Action, Fn
from tests.policies.contract import CODEC, PolicyContract

POLICIES: dict[str, Callable[[LlamaForCausalLM], Policy]] = {
    "hf": lambda model: HFPolicy(model, CODEC.tokenizer.pad_token_id),
    "scripted": lambda model: ScriptedPolicy(CODEC, lambda context: Action(Fn.PREDICT_ANSWER, "steel is washable")),
}


class TestPolicies(PolicyContract):
    @pytest.fixture(params=POLICIES)
    def policy(self, request: pytest.FixtureRequest, model: LlamaForCausalLM) -> Policy:
        return POLICIES[request.param](model)
