"""A session as a person reads it: one description, shown in a terminal and on a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import jinja2
from rich.console import Console
from rich.text import Text

from agile.types import Session, Source, Usage

LABELS = {source: "LLM" if source is Source.LLM else str(source) for source in Source} | {Source.ADVISOR: "expert"}
_STYLES = {
    Source.LLM: "bold blue",
    Source.EXECUTOR: "bright_black",
    Source.TEMPLATE: "dim",
    Source.CARRIED: "dim italic",
    Source.TASK: "magenta",
    Source.MEMORY: "green",
    Source.TOOL: "yellow",
    Source.ADVISOR: "red",
}
_GUTTER = 12


class Decoder(Protocol):
    """Token ids to text: an `ActionCodec` or a `ChatFormat`."""

    def decode(self, token_ids: Sequence[int]) -> str: ...


WRITERS = "Only what the LLM wrote is a decision, and is trained."


@dataclass(frozen=True, slots=True)
class Part:
    """One token that the LLM sampled, or a text that somebody else wrote.

    Attributes:
        logprob: Of the token when it was sampled (nats); None for what others wrote.
        value, advantage: What a critic says of the token; None where none was asked.
    """

    source: Source
    text: str
    logprob: float | None = None
    value: float | None = None
    advantage: float | None = None

    @property
    def surprise(self) -> float:
        """One minus the token's probability, in [0, 1]; 0 where that is not known."""
        return 0.0 if self.logprob is None or math.isnan(self.logprob) else 1 - math.exp(min(0.0, self.logprob))

    @property
    def figures(self) -> str:
        """`logprob -0.105, value +0.700, advantage +0.210`, as far as they are known."""
        named = (("logprob", self.logprob), ("value", self.value), ("advantage", self.advantage))
        return ", ".join(f"{name} {figure:+.3f}" for name, figure in named if figure is not None)


@dataclass(frozen=True, slots=True)
class Window:
    """A context window: who wrote what, and how it ended."""

    parts: tuple[Part, ...]
    end: str = ""

    @property
    def turns(self) -> list[tuple[Source, list[Part]]]:
        """Neighbouring parts of one writer, without white space around them; those that say nothing are left out."""
        found = []
        for source, group in groupby(self.parts, lambda part: part.source):
            parts = _stripped(list(group))
            if parts and all(part.logprob is None for part in parts):
                parts = [replace(parts[0], text="".join(part.text for part in parts))]
            if parts:
                found.append((source, parts))
        return found


@dataclass(frozen=True, slots=True)
class View:
    """What is shown of a session: a title, facts by name (several of one name stand below each other), its windows."""

    title: str
    facts: tuple[tuple[str, str], ...]
    windows: tuple[Window, ...]


# --------------------------------------------------------------------------------------------------------------------
# Describing


def describe(
    session: Session,
    codec: Decoder,
    *,
    title: str = "",
    values: Sequence[float] = (),
    advantages: Sequence[float] = (),
) -> View:
    """The description of a session.

    Args:
        title: The session's id and kind of question by default.
        values, advantages: Of every sampled token in order; none by default.
    """
    critic = iter(zip(values, advantages, strict=True))
    windows = []
    for segment in session.segments:
        parts: list[Part] = []
        for span in segment.spans:
            if span.source is not Source.LLM:
                parts.append(Part(span.source, text_of(codec, span.token_ids)))
                continue
            for text, logprob in zip(token_texts(codec, span.token_ids), span.logprobs, strict=True):
                parts.append(Part(span.source, text, logprob, *next(critic, ())))
        windows.append(Window(tuple(parts), str(segment.end)))
    return View(title or f"{session.id}: {session.kind}", tuple(_facts(session)), tuple(windows))


def _facts(session: Session) -> Iterator[tuple[str, str]]:
    yield "status", f"{session.status}: {session.error}" if session.error else str(session.status)
    if session.answer is not None:
        yield "answer", session.answer
    if session.reward is not None:
        components = ", ".join(f"{name} {value:+g}" for name, value in session.reward.components.items())
        yield "reward", f"{session.reward.total:g} ({components})"
    if session.steps:
        yield "steps", ", ".join(f"{step.action.name}{'' if step.ok else ' (not ok)'}" for step in session.steps)
    texts = {entry.item.id: entry.item.text for read in session.reads for entry in read.entries}
    for number, similarity in session.retrieved:
        yield "memory", f"{similarity:.2f}  {texts.get(number, '')}  (entry {number})"
    if session.written:
        yield "wrote", "entries " + ", ".join(map(str, session.written))
    if advice := session.advice:
        price = f", price {advice.price:g}" if advice.answered else ""
        said = ": ".join(dict.fromkeys(filter(None, (advice.answer, advice.explanation))))
        expert = f" by {advice.expert}" if advice.expert else ""
        yield "advice", f"{advice.status}{expert}{price}: {said}".removesuffix(": ")
    if (usage := session.usage) != Usage():
        cost = f", cost {usage.cost:g}" if usage.cost else ""
        cached = f" ({usage.cached_tokens:,} of them cached)" if usage.cached_tokens else ""
        yield "usage", f"{usage.prompt_tokens:,} tokens read{cached}, {usage.completion_tokens:,} written{cost}"


def text_of(codec: Decoder, token_ids: Sequence[int]) -> str:
    """Text of any ids; those that no tokenizer decodes, which a policy may have made up, stand as numbers."""
    try:
        return codec.decode(token_ids)
    except (OverflowError, TypeError, ValueError):
        return " ".join(f"<{i}>" for i in token_ids)


def token_texts(codec: Decoder, token_ids: Sequence[int]) -> list[str]:
    """What each id adds to the text of those before it; a character of several ids stands at its last one."""
    texts, done = [], ""
    for number in range(1, len(token_ids) + 1):
        whole = text_of(codec, token_ids[:number])
        if whole.endswith("\N{REPLACEMENT CHARACTER}") and number < len(token_ids):
            texts.append("")
        else:
            texts.append(whole[len(done) :])
            done = whole
    return texts


def _stripped(parts: Sequence[Part]) -> list[Part]:
    """Without white space at both ends, and without the parts that were nothing else; sampled tokens all stay."""
    kept = list(parts)
    for end in (0, -1):
        while kept and kept[end].logprob is None and not kept[end].text.strip():
            kept.pop(end)
    if kept:
        kept[0] = replace(kept[0], text=kept[0].text.lstrip())
        kept[-1] = replace(kept[-1], text=kept[-1].text.rstrip())
    return kept


# --------------------------------------------------------------------------------------------------------------------
# In a terminal


def print_view(view: View, console: Console, *, figures: bool = False) -> None:
    """Print a session in the colours of its writers; without colours, their names stand in brackets.

    Args:
        figures: Also print logprob, value and advantage of each sampled token, a line each.
    """

    def put(label: str, text: str, style: str = "", label_style: str = "") -> None:
        head, *rest = _visible(text).split("\n")
        console.print(Text.assemble((f"{label:<{_GUTTER}}", label_style), (head, style)), soft_wrap=True)
        for line in rest:
            console.print(Text(" " * _GUTTER + line, style), soft_wrap=True)

    console.print(Text(_visible(view.title), "bold"), soft_wrap=True)
    label = ""
    for name, text in view.facts:
        put("" if name == label else name, text, label_style="dim")
        label = name
    sources = {part.source for window in view.windows for part in window.parts}
    shown = [source for source in Source if source in sources]
    console.print(Text(f"\nWriters: {', '.join(_label(s, console) for s in shown)}. {WRITERS}", "dim"), soft_wrap=True)
    for number, window in enumerate(view.windows, 1):
        console.print(Text(f"\nWindow {number} of {len(view.windows)}", "bold"))
        for source, parts in window.turns:
            style = _STYLES[source]
            put(_label(source, console), "".join(part.text for part in parts), style, style)
            for part in parts if figures else ():
                if part.figures:
                    put("", f"{part.figures}  {part.text.strip()}", "dim")
        put("ends:", window.end.replace("_", " "), "dim", "dim")


def _label(source: Source, console: Console) -> str:
    return LABELS[source] if console.color_system and not console.no_color else f"[{LABELS[source]}]"


def _visible(text: str) -> str:
    """Text that a terminal cannot take for commands: what sessions say is untrusted."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


# --------------------------------------------------------------------------------------------------------------------
# On a page


def page_environment() -> jinja2.Environment:
    """The templates of all pages; what sessions say is untrusted, and is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["labels"] = {str(source): label for source, label in LABELS.items()}
    environment.globals["writers"] = WRITERS
    return environment


def render_page(view: View) -> str:
    """A page of its own for one session: one HTML document that loads nothing."""
    return page_environment().get_template("show.html.j2").render(view=view)


def view_from_json(example: Any) -> View:
    """The inverse of `agile.types.to_json` for a view; also reads `{title, spans: [(source, text)]}` and bare spans."""
    data = example if isinstance(example, dict) else {"spans": example}
    windows = data.get("windows") or [{"parts": [{"source": source, "text": text} for source, text in data["spans"]]}]
    return View(
        data.get("title") or "",
        tuple((name, text) for name, text in data.get("facts") or ()),
        tuple(
            Window(tuple(Part(**{**p, "source": Source(p["source"])}) for p in window["parts"]), window.get("end", ""))
            for window in windows
        ),
    )
