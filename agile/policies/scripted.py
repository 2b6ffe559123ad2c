"""A policy written in Python, for tests, baselines and imitation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from agile.tokens import ActionCodec
from agile.types import Action, Completion


class ScriptedPolicy:
    """Decides from the text of the context.

    Args:
        codec: Turns decisions into the tokens that an LLM would have sampled.
        decide: From the context's text to an `Action`. Where the executor wrote the name already (the text ends with
            it), the argument of the returned action is what counts.
    """

    def __init__(self, codec: ActionCodec, decide: Callable[[str], Action]):
        self.codec = codec
        self.decide = decide

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        action = self.decide(self.codec.conversation(prompt_ids))
        forced = self.codec.awaited(prompt_ids) is not None
        ids = self.codec.encode_argument(action) if forced else self.codec.encode_action(action)
        ids = ids[:max_tokens]
        finish = "stop" if ids and ids[-1] in stop else "length"
        return Completion(ids, (0.0,) * len(ids), finish)
