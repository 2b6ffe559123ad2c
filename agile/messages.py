"""Prompts that are a row's own messages through the model's chat template, with nothing around them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerFast

from agile.chat_format import ChatFormat, for_template
from agile.tokens import ActionCodec, build_tokenizer
from agile.types import AgentSpec, Fn, Item

ROLES = ("system", "developer", "user", "assistant", "tool")
# Of models from scratch: a special token for each role, and the end token after each of the assistant's messages.
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def messages_tokenizer(kind: str, texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Train a small tokenizer from texts, `word` or `bpe`, that has a chat template and no actions."""
    tokenizer = build_tokenizer(kind, texts, AgentSpec("messages", ()), vocab_size)
    tokenizer.add_tokens([f"<|{role}|>" for role in ROLES], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class MessagesCodec(ActionCodec):
    """For agents whose one decision is the answer: the LLM continues the messages of `Item.context`.

    Of the actions nothing is written; what was sampled up to the end of the assistant's turn is the answer.

    Args:
        options: Further variables of the template.

    Raises:
        AgileError: There is no template, or none that could be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, spec: AgentSpec, options: Mapping[str, Any] | None = None):
        self._chat = ChatFormat(tokenizer, options)
        super().__init__(tokenizer, spec, special_tokens=False, end_id=self._chat.end_id)
        self._prompts = lru_cache(maxsize=65536)(lambda messages: self._chat.prompt(json.loads(messages), None))

    def question_ids(self, item: Item, text: str) -> tuple[int, ...]:
        """The prompt of a row; special tokens of the model that its messages hold are text.

        Raises:
            AgileError: The template cannot show its messages.
        """
        return self._prompts(json.dumps([for_template(m) for m in item.context["messages"]], ensure_ascii=False))

    def name_ids(self, name: str) -> tuple[int, ...]:
        return ()

    def awaited(self, token_ids: Sequence[int]) -> str | None:
        return Fn.PREDICT_ANSWER
