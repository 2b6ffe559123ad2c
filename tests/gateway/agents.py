"""What tests of the gateway share: a small chat model, a policy that says what it is told, and who watches it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from agile.gateway import Gateway
from agile.learner import Learner
from agile.model import small_llama
from agile.protocols import TrainablePolicy
from agile.types import Completion, Session
from tests.families import family_tokenizer

# In the manner of Qwen: tools in the system turn, calls between tags.
TEMPLATE = """\
{% if tools %}{{- '<|im_start|>system\\n' }}{% for tool in tools %}{{- tool.function.name + ' ' }}{% endfor %}\
{{- '<|im_end|>\\n' }}{% endif %}{% for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}\
{% for call in m.tool_calls or [] %}{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}\
{{- '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
KEY = "agile-test"


def make_model(folder: Path, template: str = TEMPLATE) -> Path:
    """A Llama of random weights with a chat template."""
    tokenizer = family_tokenizer("qwen", template)
    tokenizer.pad_token = "<|endoftext|>"
    lm = small_llama(tokenizer, num_layers=1, hidden_size=32, num_heads=2, max_tokens=512, seed=0)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Told:
    """A policy that says what it is told, in turn, and keeps what it was shown; its logprobs count down from -0.5."""

    temperature = 1.0
    forbidden: Collection[int] = ()
    max_context = 512

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> None:
        self.tokenizer = tokenizer
        self.texts: Iterator[str] = iter(texts)
        self.calls: list[tuple[list[int], Completion]] = []

    async def complete(self, prompt_ids: Sequence[int], **_: Any) -> Completion:
        ids = [*self.tokenizer(next(self.texts), add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        completion = Completion(tuple(ids), tuple(-0.5 - i / 8 for i in range(len(ids))), "stop", 0)
        self.calls.append((list(prompt_ids), completion))
        return completion

    def update_weights(self, *_: Any) -> None: ...

    def close(self) -> None: ...


class Watched:
    """Passes on what another policy says, and keeps both sides."""

    def __init__(self, policy: TrainablePolicy) -> None:
        self.policy = policy
        self.calls: list[tuple[list[int], Completion]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    async def complete(self, prompt_ids: Sequence[int], **options: Any) -> Completion:
        completion = await self.policy.complete(prompt_ids, **options)
        self.calls.append((list(prompt_ids), completion))
        return completion


def tell(learner: Learner, *texts: str) -> Told:
    """Have a learner's policy say these texts."""
    told = Told(learner.tokenizer, texts)
    learner.policy = told  # type: ignore[assignment]
    return told


def gateway(learner: Learner, **options: Any) -> Gateway:
    return Gateway(learner, api_key=KEY, **{"max_tokens": 24, **options})


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def sampled(session: Session) -> list[tuple[list[int], tuple[int, ...], tuple[float, ...]]]:
    """What precedes each sampled span in its segment, and the span."""
    found = []
    for segment in session.segments:
        ids: list[int] = []
        for span in segment.spans:
            if span.logprobs:
                found.append((list(ids), span.token_ids, span.logprobs))
            ids += span.token_ids
    return found


def said(policy: Told | Watched) -> list[tuple[list[int], tuple[int, ...], tuple[float, ...]]]:
    return [(prompt, c.token_ids, c.logprobs) for prompt, c in policy.calls]
