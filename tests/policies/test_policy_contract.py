"""The policies that need no vLLM keep the promises of all policies; a new one joins by a line in `POLICIES`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from transformers import LlamaForCausalLM

from agile.policies import HFPolicy, ScriptedPolicy
from agile.policies.endpoint import Endpoint
from agile.policies.openai import OpenAIPolicy
from agile.protocols import Policy
from agile.types import Action, Fn
from tests.policies.contract import CODEC, PolicyContract
from tests.stub_endpoint import stub_endpoint
from tests.worlds import make_codec

POLICIES: dict[str, Callable[[LlamaForCausalLM], Policy]] = {
    "hf": lambda model: HFPolicy(model),
    "scripted": lambda model: ScriptedPolicy(CODEC, lambda context: Action(Fn.PREDICT_ANSWER, "steel is washable")),
}


class TestPolicies(PolicyContract):
    @pytest.fixture(params=[*POLICIES, "openai"])
    def policy(self, request: pytest.FixtureRequest, model: LlamaForCausalLM) -> Iterator[Policy]:
        if request.param in POLICIES:
            yield POLICIES[request.param](model)
            return
        with stub_endpoint() as stub:  # its carrier has the same end token
            yield OpenAIPolicy(make_codec("bpe"), 0.3, Endpoint(stub.url, "m", api_key_env=None), tools="text")
