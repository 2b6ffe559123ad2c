"""`agile show`: a session as a person reads it, in a terminal and on a page."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path

import pytest
from rich.console import Console

from agile.show import Part, View, Window, describe, print_view, render_page, text_of, token_texts, view_from_json
from agile.types import Action, Fn, MemoryItem, MemoryKind, SegmentEnd, Source, to_json
from tests.tiny import TinyRun, agile
from tests.worlds import ListMemory, Replay, make_codec, make_executor, play, script

GOLDEN = """\
s/0: fact
status      completed
answer      yes
reward      1 (correct +1)
steps       GetQuestion, RetrieveMemory, SeekAdvice, Reflection, UpdateMemory, PredictAnswer, SubmitAnswer
memory      1.00  is it washable ? -> no  (entry 1)
wrote       entries 2, 3
advice      answered by dataset, price 0.3: yes: steel is washable

Writers: [LLM], [executor], [task], [memory], [expert]. Only what the LLM wrote is a decision, and is trained.

Window 1 of 1
[executor]  [GetQuestion]
[task]      round 0
            color: red
            question: is it washable ?
[executor]  [RetrieveMemory]
[memory]    history 1.00 same is it washable ? -> no
            similar 1
[LLM]       [SeekAdvice]
            logprob +0.000  [SeekAdvice]
[expert]    expert: steel is washable
            answer: yes
[executor]  [Reflection]
[LLM]       steel<end>
            logprob +0.000  steel
            logprob +0.000  <end>
[executor]  [UpdateMemory][PredictAnswer]
[LLM]       yes<end>
            logprob +0.000  yes
            logprob +0.000  <end>
[executor]  [SubmitAnswer]
ends:       terminated
"""


def asked() -> View:
    entry = MemoryItem(MemoryKind.HISTORY, "is it washable ?", "is it washable ? -> no", "no", "shop", "p1")
    actions = (Action(Fn.SEEK_ADVICE), Action(Fn.REFLECTION, "steel"), Action(Fn.PREDICT_ANSWER, "yes"))
    session = play(make_executor(), script(make_codec(), *actions), memory=ListMemory([entry]))
    return describe(session, make_codec())


def printed(view: View, *, colours: bool = False, figures: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=colours, color_system="truecolor" if colours else None, width=60)
    print_view(view, console, figures=figures)
    return file.getvalue()


def test_a_session_reads_like_a_talk() -> None:
    assert printed(asked(), figures=True) == GOLDEN


def test_colours_stand_for_brackets_and_say_the_same() -> None:
    coloured = printed(asked(), colours=True, figures=True)
    assert "\x1b[1;34mLLM" in coloured and "\x1b[32mmemory" in coloured
    plain = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    golden = re.sub(r"\[(LLM|executor|task|memory|expert)\](  +)?", lambda m: m[1].ljust(12) if m[2] else m[1], GOLDEN)
    assert plain == golden


def test_a_page_shades_what_was_unlikely_and_escapes_what_was_said() -> None:
    parts = (
        Part(Source.TASK, "<script>alert(1)</script> \n"),
        Part(Source.LLM, "sure", -0.0),
        Part(Source.LLM, " <b>", -0.6931472, 0.25, -1.5),
        Part(Source.ADVISOR, "  "),
    )
    page = render_page(View("t <i>", (("reward", "0.7"), ("memory", "a"), ("memory", "b")), (Window(parts, "x_y"),)))
    assert "<script" not in page and "<b>" not in page and "<i>" not in page
    assert '--surprise:0.00" title="logprob -0.000">sure</span>' in page
    assert '--surprise:0.50" title="logprob -0.693, value +0.250, advantage -1.500"> &lt;b&gt;</span>' in page
    assert page.count('class="span ') == 2, "the expert said nothing"
    assert "<dt>memory</dt><dd>a</dd><dt></dt><dd>b</dd>" in page and "window 1 of 1: x y" in page


def test_a_terminal_gets_no_commands_from_sessions() -> None:
    shown = printed(View("t", (("answer", "\x1b[2J\ud800"),), (Window((Part(Source.TOOL, "a\x07\r\nb"),)),)))
    assert "\x1b" not in shown and "\x07" not in shown and "\r" not in shown
    assert "\\x1b[2J\\ud800" in shown and "a\\x07\\r\n            b" in shown


def test_a_view_survives_json() -> None:
    view = asked()
    assert view_from_json(to_json(view)) == view
    assert view_from_json([("task", "a"), ("llm", "b")]).windows[0].turns[1] == (Source.LLM, [Part(Source.LLM, "b")])


def test_values_and_advantages_stand_at_their_tokens() -> None:
    codec = make_codec()
    ids = (codec.action_ids[Fn.PREDICT_ANSWER], *codec.encode("yes"), codec.end_id)
    session = play(make_executor(), Replay([(codec.end_id,), ids]))
    values = [0.5 + n for n in range(1 + len(ids))]
    view = describe(session, codec, values=values, advantages=[-v for v in values])
    found = [part for window in view.windows for part in window.parts if part.source is Source.LLM]
    assert [part.value for part in found] == values
    assert [part.advantage for part in found] == [-v for v in values]
    assert [part.logprob for part in found] == [-0.5, *(-0.5 - n for n in range(len(ids)))]


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_tokens_add_up_to_their_text(kind: str) -> None:
    codec, rng = make_codec(kind), random.Random(0)
    for text in ("steel is washable", "caf\u00e9 \u2603 yes", ""):
        ids = codec.encode(text)
        assert "".join(token_texts(codec, ids)) == codec.decode(ids)
    for _ in range(50):
        ids = tuple(rng.randrange(len(codec.tokenizer)) for _ in range(12))
        texts = token_texts(codec, ids)
        assert len(texts) == 12
    assert text_of(codec, [-1]) == "<-1>"


# --------------------------------------------------------------------------------------------------------------------
# The command


def test_sessions_of_a_step_are_listed(made: Path) -> None:
    listed = agile("show", made)
    assert listed.exit_code == 0
    assert "step 2" in listed.output and listed.output.count("shop_000") == 17
    assert f"agile show {made} --session shop_0000/0 --step 2" in " ".join(listed.output.split())
    rows = agile("show", made, "--step", "1").output.splitlines()
    assert any(re.search(r"completed +yes +0\.7", row) for row in rows)


def test_a_session_is_shown_and_written(made: Path, tmp_path: Path) -> None:
    shown = agile("show", made, "--session", "shop_0000/1", "--logprobs")
    assert shown.exit_code == 0
    assert shown.output.startswith("shop_0000/1 (step 2, sessions-0.jsonl)")
    assert "[task]" in shown.output and "logprob -" in shown.output
    assert "The newest of 2 of this id (step 1, step 2)" in shown.output
    page = tmp_path / "session.html"
    assert agile("show", made, "--session", "shop_0000/1", "--step", "1", "--html", page).exit_code == 0
    assert "shop_0000/1 (step 1, sessions-0.jsonl)" in page.read_text()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--logprobs"], "name it by --session ID"),
        (["--session", "shop_0000/1", "--values"], "has no checkpoint of PPO"),
        (["--session", "x"], "has no session 'x'"),
        (["--step", "7"], "has no step 7; it has 1, 2."),
    ],
)
def test_what_cannot_be_shown_is_named(made: Path, words: list[str], part: str) -> None:
    result = agile("show", made, *words)
    assert result.exit_code == 2
    assert part in " ".join(result.output.split())


def test_a_critic_says_what_each_token_is_worth(tiny_run: TinyRun) -> None:
    session_id = re.findall(r"--session (\S+)", agile("show", tiny_run.path).output)[0]
    shown = agile("show", tiny_run.path, "--session", session_id, "--values")
    assert shown.exit_code == 0, shown.output
    assert "critic of ppo-000001" in shown.output
    tokens = re.findall(r"logprob (\S+), value (\S+), advantage (\S+) ", shown.output)
    assert len(tokens) == shown.output.count("logprob ") > 0


def test_ends_of_windows_are_words() -> None:
    view = View("t", (), (Window((Part(Source.TASK, "a"),), SegmentEnd.CONTEXT_CLEARED), Window((), "terminated")))
    assert "ends:       context cleared" in printed(view) and "Window 2 of 2\nends:       terminated" in printed(view)
