"""The calls of one trajectory as segments: what extends an earlier call's exact tokens joins it, all else is apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from agile.types import Completion, Segment, SegmentEnd, Source, Span


@dataclass(slots=True, eq=False)
class Window:
    """A segment in the making.

    Attributes:
        token_ids: All that it holds.
        answered: How many spans and tokens the calls left that were answered.
        busy: Whether a call is under way that extends it.
    """

    spans: list[Span] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    answered: tuple[int, int] = (0, 0)
    busy: bool = False

    def observe(self, source: Source, token_ids: Sequence[int]) -> None:
        """Tokens that the LLM was shown."""
        if token_ids:
            self.spans.append(Span(source, tuple(token_ids)))
            self.token_ids += token_ids

    def sampled(self, completion: Completion) -> None:
        self.spans.append(
            Span(Source.LLM, completion.token_ids, completion.logprobs, policy_version=completion.policy_version)
        )
        self.token_ids += completion.token_ids


class Recording:
    """Windows in the order in which their first calls began.

    A call whose prompt begins with all tokens of a window extends it: the longest such one, unless another call under
    way does so already. Every other prompt (context that was edited, a sub-agent, a parallel call) opens a window,
    whose prompt is observed and carries no loss, sampled or not: each sampled token is learned from once.
    """

    def __init__(self) -> None:
        self._windows: list[Window] = []
        self._samples = 0

    @property
    def num_windows(self) -> int:
        return len(self._windows)

    def next_sample(self) -> int:
        """The number of a sample, from 0."""
        self._samples += 1
        return self._samples - 1

    def begin(self, prompt_ids: Sequence[int], source: Source) -> Window:
        """The window of a call, with its prompt; `end` or `abandon` must follow."""
        prompt = list(prompt_ids)
        free = [w for w in self._windows if not w.busy and prompt[: len(w.token_ids)] == w.token_ids]
        window = max(free, key=lambda w: len(w.token_ids), default=None)
        if window is None:
            window = Window()
            self._windows.append(window)
        window.observe(source, prompt[len(window.token_ids) :])
        window.busy = True
        return window

    def end(self, window: Window) -> None:
        """The call was answered."""
        window.answered = len(window.spans), len(window.token_ids)
        window.busy = False

    def abandon(self, window: Window) -> None:
        """The call was not answered: what it was shown and had sampled is taken back, for nobody acts on it."""
        num_spans, num_tokens = window.answered
        del window.spans[num_spans:], window.token_ids[num_tokens:]
        window.busy = False
        if not num_spans:
            self._windows.remove(window)

    def segments(self) -> tuple[Segment, ...]:
        """Those that hold sampled tokens; value flows from each to the next, and ends with the last."""
        windows = [w for w in self._windows if any(s.source is Source.LLM for s in w.spans)]
        last = len(windows) - 1
        return tuple(
            Segment(tuple(w.spans), SegmentEnd.TERMINATED if i == last else SegmentEnd.CONTEXT_CLEARED)
            for i, w in enumerate(windows)
        )
