"""Messages to token ids and back, by the model's own chat template, without ever tokenising a sampled turn again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from agile.errors import AgileError
from agile.tokens import PlainText

Message = dict[str, Any]

# How tool calls are written where the tokenizer does not say so: as Qwen, Hermes and many others do.
TOOL_CALLS = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}
_MARK = 0xE000  # private characters that stand for what is typed like a special token


@dataclass(frozen=True, slots=True)
class Answer:
    """What was sampled, as OpenAI's API says it.

    Attributes:
        tool_calls: `(name, arguments as JSON)` of each.
    """

    content: str
    reasoning: str = ""
    tool_calls: tuple[tuple[str, str], ...] = ()


class ChatFormat:
    """A tokenizer's chat template.

    Args:
        tokenizer: With a `chat_template`; its `response_template`, if it has one, says how answers are read.
        options: Further variables of the template, such as `enable_thinking`.

    Attributes:
        end_id: The token that ends the LLM's turn.

    Raises:
        AgileError: There is no template, or it ends the LLM's turn without a special token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, options: Mapping[str, Any] | None = None):
        if tokenizer.chat_template is None:
            raise AgileError(
                "The tokenizer has no chat template (tokenizer.chat_template), so messages cannot be turned into a "
                "prompt. Take the instruction-tuned model of the family, or set a template and save the tokenizer."
            )
        self.tokenizer = tokenizer
        self.options = dict(options or {})
        self._plain = PlainText(tokenizer)
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip()]
        self._special = sorted(special, key=len, reverse=True)
        self._typed = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")
        self._marks = re.compile(f"([{chr(_MARK)}-{chr(_MARK + len(special))}])")
        exchange = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWERMARK"}]
        after = self._render(exchange, None, open_turn=False).partition("ANSWERMARK")[2]
        ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"] if after.strip() else []
        if not ids or ids[0] not in tokenizer.added_tokens_decoder:
            raise AgileError(
                f"The chat template ends the LLM's turn with {after!r}, which does not start with a special token: "
                "where an answer ends could not be told from its text. Choose a model whose template does."
            )
        opened = self._render(exchange[:1], None, open_turn=True)
        self._thinks = "<think>" if opened.rstrip().endswith("<think>") else ""
        self.end_id = int(ids[0])
        self._end = self.decode([self.end_id])

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> tuple[int, ...]:
        """The ids of a conversation, the LLM's turn opened.

        Raises:
            AgileError: The template does not take it.
        """
        return self._encode(self._render(messages, tools, open_turn=True))

    def continuation(
        self, messages: Sequence[Message], num_before: int, tools: Sequence[Any] | None, *, ended: bool
    ) -> tuple[int, ...] | None:
        """What to append to the tokens of a turn that was sampled, so that the conversation stands as `messages`.

        Args:
            num_before: How many of the messages those tokens hold, the sampled one included.
            ended: Whether the sampled turn holds its end.

        Returns:
            None if the template renders those messages differently now that others follow.

        Raises:
            AgileError: The template does not take the messages.
        """
        before = self._render(messages[:num_before], tools, open_turn=False)
        whole = self._render(messages, tools, open_turn=True)
        _, end, tail = before.rpartition(self._end)
        if not end or not whole.startswith(before):
            return None
        return self._encode(("" if ended else end) + tail + whole[len(before) :])

    def spoken(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> list[tuple[bool, tuple[int, ...]]]:
        """A whole conversation as it would have been sampled: pieces of tokens, and whether they are the LLM's.

        Raises:
            AgileError: The template does not take it, or renders earlier turns differently as it grows.
        """
        pieces: list[tuple[bool, tuple[int, ...]]] = []
        last = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            shown = (
                self.continuation(messages[:i], last, tools, ended=True) if last else self.prompt(messages[:i], tools)
            )
            if shown is None:
                raise AgileError("The chat template renders earlier turns differently once others follow.")
            whole = self._render(messages[: i + 1], tools, open_turn=False)
            said = whole[len(self._render(messages[:i], tools, open_turn=True)) :].rpartition(self._end)[0]
            pieces += [(False, shown), (True, (*self._encode(said), self.end_id))]
            last = i + 1
        return pieces

    def answer(self, prompt_ids: Sequence[int], sampled_ids: Sequence[int], *, tools: bool) -> Answer:
        """Read what was sampled; without tools, or where it cannot be read, all of it is text."""
        ids = list(sampled_ids)
        if ids and ids[-1] == self.end_id:
            ids.pop()
        text = self.decode(ids)
        if not tools:
            return Answer(text)
        template = getattr(self.tokenizer, "response_template", None)
        prefix = self.decode(prompt_ids) if template else self._thinks
        try:
            found = self.tokenizer.parse_response(text, template or TOOL_CALLS, prefix=prefix)
            calls = tuple(_call(call["function"]) for call in found.get("tool_calls") or ())
        except (ValueError, KeyError, TypeError):  # what was sampled may be anything
            return Answer(text)
        return Answer(str(found.get("content") or "").strip(), str(found.get("thinking") or "").strip(), calls)

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] | None, *, open_turn: bool) -> str:
        safe = [self._marked(m) for m in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    safe,
                    tools=list(tools) if tools else None,
                    tokenize=False,
                    add_generation_prompt=open_turn,
                    **self.options,
                )
            )
        except Exception as error:  # templates raise errors of their own, and jinja its
            roles = ", ".join(str(m["role"]) for m in messages)
            raise AgileError(
                f"The model's chat template cannot show messages of the roles {roles} ({str(error).rstrip('.')}); use "
                "roles that it knows."
            ) from error

    def _marked(self, value: Any) -> Any:
        """A message with a private character wherever a special token is typed in its texts."""
        if isinstance(value, str):
            return self._typed.sub(lambda found: chr(_MARK + self._special.index(found[0])), value)
        if isinstance(value, Mapping):
            return {k: self._marked(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._marked(v) for v in value]
        return value

    def _encode(self, text: str) -> tuple[int, ...]:
        ids: list[int] = []
        text = text.encode("utf-8", "replace").decode()
        for i, piece in enumerate(self._marks.split(text)):
            if i % 2:
                index = ord(piece) - _MARK
                ids += self._plain(self._special[index] if index < len(self._special) else piece)
            elif piece:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return tuple(ids)


def _call(function: Mapping[str, Any]) -> tuple[str, str]:
    name, arguments = function["name"], function.get("arguments", {})
    if not isinstance(name, str):
        raise ValueError(f"the tool's name is {name!r}")
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def for_template(message: Mapping[str, Any]) -> Message:
    """A message of OpenAI's API as chat templates take it: text in one piece, arguments as objects.

    Raises:
        AgileError: It holds something other than text.
    """
    content = message.get("content")
    if isinstance(content, list):
        odd = [part for part in content if not isinstance(part, Mapping) or part.get("type") != "text"]
        if odd:
            raise AgileError(f"a part of a message is {str(odd[0])!r:.80}; the model reads text alone.")
        content = "\n".join(part["text"] for part in content)
    role = "system" if message["role"] == "developer" else message["role"]
    plain: Message = {"role": role, "content": content or ""}
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [
            {
                "type": "function",
                "function": {
                    "name": c["function"]["name"],
                    "arguments": parsed_arguments(c["function"].get("arguments")),
                },
            }
            for c in calls
        ]
    plain |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
    return plain


def as_message(answer: Answer) -> Message:
    """An answer as chat templates take it."""
    message: Message = {"role": "assistant", "content": answer.content}
    if answer.tool_calls:
        message["tool_calls"] = [tool_call(*call) for call in answer.tool_calls]
    return message


def tool_call(name: str, arguments: str) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": parsed_arguments(arguments)}}


def parsed_arguments(text: Any) -> Any:
    """The arguments of a tool call as an object, or the text that is none."""
    if not isinstance(text, str):
        return text or {}
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, dict) else text


def same(a: Sequence[Message], b: Sequence[Message]) -> bool:
    """Whether two lists of messages, as `for_template` gives them, say the same; ids of tool calls say nothing."""

    def said(message: Message) -> Message:
        return {k: v.strip() if k == "content" else v for k, v in message.items() if k != "tool_call_id"}

    return len(a) == len(b) and all(said(x) == said(y) for x, y in zip(a, b, strict=True))
