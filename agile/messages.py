"""Prompts that are a row's own messages through the model's chat template, with nothing around them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerFast

from agile.errors import AgileError
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
        AgileError: There is no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, spec: AgentSpec, options: Mapping[str, Any] | None = None):
        if tokenizer.chat_template is None:
            raise AgileError(
                "The tokenizer has no chat template (tokenizer.chat_template), which rows of messages need. Take the "
                "instruction-tuned model of the family, or give the tokenizer a template."
            )
        self._options = dict(options or {})
        super().__init__(tokenizer, spec, special_tokens=False, end_id=_end_of_turn(tokenizer, self._options))
        self._special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content.strip()]
        self._rendered = lru_cache(maxsize=65536)(self._render)

    def question_ids(self, item: Item, text: str) -> tuple[int, ...]:
        """The prompt of a row.

        Raises:
            AgileError: The template cannot show its messages, or they hold a special token of the model.
        """
        return self._rendered(json.dumps(item.context["messages"], ensure_ascii=False))

    def _render(self, messages: str) -> tuple[int, ...]:
        rows = json.loads(messages)
        for message in rows:
            if found := next((token for token in self._special if token in message["content"]), None):
                raise AgileError(
                    f"a message holds {found}, a special token of this model, which would not be read as text; write "
                    "it otherwise"
                )
        text = _apply(self.tokenizer, rows, self._options)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def name_ids(self, name: str) -> tuple[int, ...]:
        return ()

    def awaited(self, token_ids: Sequence[int]) -> str | None:
        return Fn.PREDICT_ANSWER


def _apply(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, str]],
    options: Mapping[str, Any],
    *,
    opens: bool = True,
) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens, **options)
    except Exception as error:  # templates raise errors of their own, and jinja its
        roles = ", ".join(str(message["role"]) for message in messages)
        raise AgileError(
            f"the model's chat template cannot show messages of the roles {roles} ({str(error).rstrip('.')}); use "
            "roles that it knows"
        ) from None
    return str(text)


def _end_of_turn(tokenizer: PreTrainedTokenizerFast, options: Mapping[str, Any]) -> int | None:
    """The token that the template writes after an assistant's message; None if it writes none."""
    mark = "ANSWERMARK"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
    after = _apply(tokenizer, messages, options, opens=False).partition(mark)[2].lstrip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    return int(ids[0]) if ids and ids[0] in tokenizer.added_tokens_decoder else None
