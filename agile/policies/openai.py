"""A prompted agent: any model behind an OpenAI-compatible chat endpoint, as a policy."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from agile.errors import AgileError
from agile.policies.endpoint import Answer, Endpoint, Rejected
from agile.policies.transcript import Transcript, read_context
from agile.prompts import ARGUMENT, instructions, next_line, tool
from agile.tokens import ActionCodec
from agile.types import AgentSpec, Completion, Usage

logger = logging.getLogger(__name__)


class OpenAIPolicy:
    """Reads the context back into steps, asks a chat model for the next one, and writes its answer in action tokens.

    The ids are those of a carrier tokenizer, a byte-level one that has a token for every text. Its tokens are not the
    model's, so every log-probability is 0: such sessions can be scored, not trained on. An answer that is no action is
    passed on as text, and the executor replies with its error as to any LLM.

    Args:
        codec: Of the executor.
        price: Of advice, as the system prompt states it.
        endpoint: Where the model is.
        tools: `native` calls actions as tools of the API, `text` writes them, `auto` tries tools first and falls back
            to text for good where the endpoint rejects or ignores them.
        temperature: Of sampling; None leaves it to the endpoint, as some models demand. At 0 no seed is sent.
        max_tokens: Most tokens of the model in one answer.

    Raises:
        AgileError: The tokenizer has no unknown token to mark what is no action.
    """

    def __init__(
        self,
        codec: ActionCodec,
        price: float,
        endpoint: Endpoint,
        *,
        tools: str = "auto",
        temperature: float | None = 0.0,
        max_tokens: int = 512,
    ):
        if codec.tokenizer.unk_token_id is None:
            raise AgileError("A carrier tokenizer needs an unknown token; make it with agile.tokens.build_tokenizer.")
        self.codec = codec
        self.endpoint = endpoint
        self.temperature = temperature
        self.max_tokens = max_tokens
        self._none_id: int = codec.tokenizer.unk_token_id
        self._systems = {native: instructions(codec.spec, price, native=native, hints=True) for native in (True, False)}
        self._form_key = endpoint.cache.key({"base_url": endpoint.base_url, "model": endpoint.model, "form": tools})
        # what the endpoint was found to accept; `native` is None until a first answer tells
        found = endpoint.cache.get(self._form_key) or {}
        self._native: bool | None = found.get("native") if tools == "auto" else tools == "native"
        self._limit_key: str = found.get("limit", "max_tokens")

    @property
    def native(self) -> bool:
        """Whether actions are called as tools."""
        return self._native is not False

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        context = read_context(self.codec, prompt_ids, self._none_id)
        async with self.endpoint.first_alone():
            answer = await self._ask(context, seed)
        name, argument = _action(self.codec.spec, answer.message, context.forced)
        ids = self.encode(name, argument, context.forced, whole=answer.finish_reason != "length")
        end = next((i + 1 for i, token in enumerate(ids) if token in stop), len(ids))
        ids = ids[: min(end, max_tokens)]
        finish = "stop" if ids and ids[-1] in stop else "length"
        return Completion(ids, (0.0,) * len(ids), finish, usage=answer.usage)

    def encode(self, name: str, argument: str, forced: str | None, *, whole: bool) -> tuple[int, ...]:
        """What an LLM would have sampled; an argument that was cut off has no end."""
        end = (self.codec.end_id,)
        if forced is None and name and not self.codec.spec[name].takes_argument:
            return (self.codec.action_ids[name], *end)
        head = () if forced is not None else (self.codec.action_ids[name] if name else self._none_id,)
        return head + self.codec.encode(argument) + (end if whole else ())

    async def _ask(self, context: Transcript, seed: int) -> Answer:
        """The endpoint's answer, in the form that it accepts."""
        taken = Usage()
        while True:
            native, limit_key = self.native, self._limit_key
            try:
                answer = await self.endpoint.ask(self._body(context, seed))
            except Rejected as error:
                if (native, limit_key) == (self.native, self._limit_key) and not self._adapt(error):
                    raise self._final(error) from error
                continue
            taken += answer.usage
            if self._native is None:
                self._settle(native=bool(answer.message.get("tool_calls")), reason="it answers without calling them")
            if self.native == native:
                return replace(answer, usage=taken)

    def _adapt(self, error: Rejected) -> bool:
        """Whether the endpoint may accept the request in another form, which is taken from now on."""
        if self._limit_key == "max_tokens" and "max_completion_tokens" in error.text:
            self._limit_key = "max_completion_tokens"
            self._keep_form()
            return True
        if self._native is None and re.search("tool|function", error.text):
            self._settle(native=False, reason=str(error))
            return True
        return False

    def _settle(self, *, native: bool, reason: str) -> None:
        self._native = native
        self._keep_form()
        if not native:
            logger.warning(
                "%s does not take actions as tools (%s); they are written as text.", self.endpoint.base_url, reason
            )

    def _keep_form(self) -> None:
        self.endpoint.cache.put(self._form_key, {"native": self._native, "limit": self._limit_key})

    def _final(self, error: Rejected) -> Exception:
        where = f"{self.endpoint.base_url}, model {self.endpoint.model!r}"
        if error.status == 404 or error.code == "model_not_found":
            return AgileError(
                f"{where}: not found ({error}). Check evaluate.prompted.model and evaluate.prompted.base_url, which "
                "ends in /v1 at most servers."
            )
        of_one_session = error.status == 413 or re.search("context|length|too long|content|policy|filter", error.text)
        if self.endpoint.answered or of_one_session:
            return RuntimeError(f"{where} rejected the request ({error})")
        return AgileError(
            f"{where} rejected the first request ({error}). Check evaluate.prompted: tools, temperature (null sends "
            "none) and max_tokens."
        )

    def _body(self, context: Transcript, seed: int) -> dict[str, Any]:
        spec, native = self.codec.spec, self.native
        body: dict[str, Any] = {
            "messages": messages(spec, context, self._systems[native], native=native),
            self._limit_key: self.max_tokens,
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.temperature != 0:
            body["seed"] = seed % 2**31
        if native:
            body["tools"] = [tool(spec, name) for name in context.legal]
            named = {"type": "function", "function": {"name": context.forced}}
            body["tool_choice"] = "required" if context.forced is None else named
        return body


def messages(spec: AgentSpec, context: Transcript, system: str, *, native: bool) -> list[dict[str, Any]]:
    """A context as a conversation: what the model chose is the assistant's, all else it was shown.

    As text, what is shown ends with a line that says what may come next.
    """
    result: list[dict[str, Any]] = [{"role": "system", "content": system}]
    shown, call = [context.opening.strip()], ""

    def show(legal: Sequence[str]) -> None:
        nonlocal call
        text = "\n".join([*filter(None, shown), *([] if native else [next_line(spec, legal)])])
        who = {"role": "tool", "tool_call_id": call} if call else {"role": "user"}
        result.append({**who, "content": text or "ok"})
        shown.clear()
        call = ""

    for number, step in enumerate(context.steps):
        observation = step.observation.strip()
        if len(step.legal) == 1 and step.name == step.legal[0] and not spec[step.name].takes_argument:
            shown.append(f"[{step.name}]\n{observation}".strip())
            continue
        show(step.legal)
        if native and step.name:
            call = f"call{number:05d}"  # some endpoints take nine letters and digits and nothing else
            given = {ARGUMENT: step.argument} if spec[step.name].takes_argument else {}
            function = {"name": step.name, "arguments": json.dumps(given, ensure_ascii=False)}
            calls = [{"id": call, "type": "function", "function": function}]
            result.append({"role": "assistant", "content": None, "tool_calls": calls})
        else:
            text = f"[{step.name}] {step.argument}".strip() if step.name else step.argument
            result.append({"role": "assistant", "content": text})
        shown.append(observation)
    show(context.legal)
    return result


def _action(spec: AgentSpec, message: Mapping[str, Any], forced: str | None) -> tuple[str, str]:
    """Name and argument in an answer; the name is empty if it is no action."""
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        name, argument = str(function.get("name")), _argument(function.get("arguments"))
        known = any(a.name == name for a in spec.actions)
        return (name, argument) if known else ("", f"[{name}] {argument}".strip())
    text = str(message.get("content") or message.get("refusal") or "").strip()
    names = "|".join(re.escape(a.name) for a in spec.actions)
    # thoughts before an action, and what the model imagines to follow it, are left out
    found = re.search(rf"^\W*\[({names})\][ \t:*`]*(.*?)\s*(?=^\W*\[({names})\]|\Z)", text, re.DOTALL | re.MULTILINE)
    if found is not None and forced in (None, found[1]):
        return found[1], found[2]
    return ("", text) if forced is None else (forced, text)


def _argument(arguments: Any) -> str:
    """The text in a tool call's arguments; what is not as asked for is taken as it is."""
    try:
        values = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return str(arguments).strip()
    if isinstance(values, dict):
        values = values.get(ARGUMENT, next(iter(values.values()), ""))
    return str("" if values is None else values).strip()
