"""The context of a first decision without what was retrieved: what credit `lineage` compares to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from agile.agents.product_qa import ProductQAAgent
from agile.executor import Executor, Limits
from agile.protocols import Memory
from agile.replay import first_difference, replay_session
from agile.session_log import session_from_json
from agile.tokens import ActionCodec, Turns
from agile.types import (
    Action,
    ActionSpec,
    AgentSpec,
    Fn,
    Item,
    MemoryItem,
    MemoryKind,
    Observation,
    Retrieved,
    Scope,
    Session,
    SessionStatus,
    ToolResult,
    to_json,
)
from tests.worlds import NOTES, Add, ListMemory, NoteAgent, item, make_codec, make_executor, play, script

PREDICT = Action(Fn.PREDICT_ANSWER, "yes")


def history(question: str, product: str = "p1") -> MemoryItem:
    return MemoryItem(MemoryKind.HISTORY, question, f"{question} -> yes", "yes", "shop", product)


def knowledge(text: str) -> MemoryItem:
    return MemoryItem(MemoryKind.KNOWLEDGE, text, text, group="shop")


# three of them count as similar to `is it washable ?` (0.46): the first two of its words, the third of another product
MEMORY = (
    history("is it washable ?"),
    history("is it washable now ?"),
    history("is it washable ?", "p2"),
    history("how long ?"),
    knowledge("steel is washable"),
)


def recording(
    agent: ProductQAAgent | NoteAgent, codec: ActionCodec | None = None, limits: Limits | None = None
) -> Executor:
    plain = make_executor(agent, codec=codec, tools={"SearchProduct": Add(), "Add": Add()})
    return Executor(agent, plain.codec, plain.tools, plain.desk, plain.score, limits, counterfactual=True)


def shown(executor: Executor, session: Session) -> str:
    return executor.codec.decode(session.counterfactual).replace("\n", " / ").rstrip()


@pytest.mark.parametrize(
    ("agent", "retrieved", "left"),
    [
        (ProductQAAgent(), {1, 5}, 2),  # the shown entry is off the count, knowledge never was on it
        (ProductQAAgent(product_k=3), {1, 2, 4, 5}, 1),  # the fourth is shown, but not similar
        (ProductQAAgent(product_k=1, group_k=9), {1, 2, 3, 4, 5}, 0),
        (ProductQAAgent(product_k=0, knowledge_k=1), {5}, 3),
    ],
)
def test_entries_are_gone_and_off_the_count(agent: ProductQAAgent, retrieved: set[int], left: int) -> None:
    executor = recording(ProductQAAgent(agent.product_k, agent.group_k, agent.knowledge_k, show_schema=False))
    session = play(executor, script(executor.codec, PREDICT), memory=ListMemory(MEMORY))
    assert {entry for entry, _ in session.retrieved} == retrieved
    opening = "[GetQuestion]round 0 / color: red / question: is it washable ? / [RetrieveMemory]"
    assert shown(executor, session) == f"{opening}similar {left} /"


def test_what_an_empty_memory_would_have_shown_is_what_is_left() -> None:
    executor = recording(ProductQAAgent(product_k=1, group_k=9, show_schema=False))
    full = play(executor, script(executor.codec, PREDICT), memory=ListMemory(MEMORY))
    empty = play(executor, script(executor.codec, PREDICT), memory=ListMemory())
    before = [i for span in empty.segments[0].spans[:4] for i in span.token_ids]
    assert list(full.counterfactual) == before
    assert empty.counterfactual == (), "it retrieved nothing"
    assert empty.segments[0].spans[3].token_ids != full.segments[0].spans[3].token_ids


def test_nothing_is_recorded_unless_asked_for_and_the_session_is_the_same() -> None:
    asked = recording(ProductQAAgent(show_schema=False))
    plain = make_executor(asked.agent)
    sessions = [play(e, script(e.codec, PREDICT), memory=ListMemory(MEMORY)) for e in (asked, plain)]
    assert sessions[0].counterfactual and not sessions[1].counterfactual
    assert to_json(sessions[0]) | {"counterfactual": []} == to_json(sessions[1]) | {"counterfactual": []}


def test_in_a_chat_the_turns_around_it_stay() -> None:
    plain = make_codec()
    opening, to_llm, to_user = (plain.encode(t) for t in ("<user> rules\n", "\n<llm> ", "\n<user> "))
    codec = ActionCodec(plain.tokenizer, plain.spec, turns=Turns(opening, to_llm, to_llm, to_user))
    executor = recording(ProductQAAgent(show_schema=False), codec)
    session = play(executor, script(codec, PREDICT), memory=ListMemory(MEMORY))
    assert shown(executor, session).startswith("<user> rules / [GetQuestion]round 0")
    assert shown(executor, session).endswith("[RetrieveMemory]similar 2 /  / <llm>")
    context = [i for span in session.segments[0].spans[:-2] for i in span.token_ids]
    assert context[: len(opening)] == list(session.counterfactual[: len(opening)])


# --------------------------------------------------------------------------------------------------------------------
# Agents that read elsewhere than just before their first decision

EARLY = AgentSpec(  # reads twice, forgets the first, then decides, then reads a third time
    "early",
    (
        ActionSpec(Fn.RETRIEVE_MEMORY, "Look.", ("Skip",)),
        ActionSpec("Skip", "Nothing.", (Fn.CLEAR_CONTEXT,)),
        ActionSpec(Fn.CLEAR_CONTEXT, "Forget.", (Fn.GET_QUESTION,)),
        ActionSpec(Fn.GET_QUESTION, "Read.", (Fn.PREDICT_ANSWER,)),
        ActionSpec(Fn.PREDICT_ANSWER, "Answer.", (Fn.SUBMIT_ANSWER,), takes_argument=True),
        ActionSpec(Fn.SUBMIT_ANSWER, "Hand in.", ()),
    ),
)


@dataclass(frozen=True, slots=True)
class Skip(Add):
    async def __call__(self, argument: str, item: Item, earlier: Sequence[Observation] = ()) -> ToolResult:
        return ToolResult("skipped\n")


def notes_executor(spec: AgentSpec) -> Executor:
    plain = make_executor(NoteAgent(spec=spec), codec=make_codec("bpe", spec), tools={"Add": Add(), "Skip": Skip()})
    return Executor(plain.agent, plain.codec, plain.tools, plain.desk, plain.score, counterfactual=True)


def test_of_a_window_that_was_cleared_before_the_first_decision_nothing_stands_there_to_take_out() -> None:
    executor = notes_executor(EARLY)
    session = play(executor, script(executor.codec, PREDICT), memory=ListMemory([knowledge("steel is washable")]))
    assert [entry for entry, _ in session.retrieved] == [1]
    assert shown(executor, session) == "[GetQuestion]question: is it washable ? / [PredictAnswer]"


def test_of_what_is_retrieved_later_the_first_decision_knew_nothing() -> None:
    executor = notes_executor(NOTES)
    actions = (Action(Fn.REFLECTION, "red"), PREDICT)
    session = play(executor, script(executor.codec, *actions), memory=ListMemory([knowledge("steel is washable")]))
    assert [entry for entry, _ in session.retrieved] == [1]
    assert shown(executor, session) == "[GetQuestion]question: is it washable ? /"


def test_every_read_before_the_first_decision_is_taken_out() -> None:
    table = {a.name: a for a in EARLY.actions}
    twice = AgentSpec(
        "twice",
        (
            ActionSpec(Fn.RETRIEVE_MEMORY, "Look.", ("Skip",)),
            ActionSpec("Skip", "Nothing.", ("Add", Fn.RETRIEVE_MEMORY)),
            ActionSpec("Add", "Nothing.", (Fn.PREDICT_ANSWER,)),
            table[Fn.PREDICT_ANSWER],
            table[Fn.SUBMIT_ANSWER],
        ),
    )
    executor = notes_executor(twice)
    again = [Action(Fn.RETRIEVE_MEMORY), Action("Add"), PREDICT]
    memory = ListMemory([knowledge("steel is washable")])
    session = play(executor, script(executor.codec, *again), memory=memory)
    assert [entry for entry, _ in session.retrieved] == [1, 1]
    assert shown(executor, session) == "[RetrieveMemory][Skip]skipped /"


def test_a_session_that_decided_nothing_has_none() -> None:
    executor = recording(ProductQAAgent(show_schema=False), limits=Limits(max_turns=0))
    session = play(executor, script(executor.codec, PREDICT), memory=ListMemory(MEMORY))
    assert session.status is SessionStatus.TRUNCATED and session.retrieved
    assert session.counterfactual == ()


class Writing(NoteAgent):
    def recall(self, item: Item, memory: Memory) -> tuple[list[Retrieved], str]:
        memory.write([knowledge("x")])
        return super().recall(item, memory)


def test_an_agent_that_writes_while_it_recalls_is_told_so() -> None:
    executor = Executor(
        Writing(spec=EARLY),
        make_codec("bpe", EARLY),
        {"Skip": Skip()},
        notes_executor(EARLY).desk,
        notes_executor(EARLY).score,
        counterfactual=True,
    )
    session = play(executor, script(executor.codec, PREDICT))
    assert session.status is SessionStatus.FAILED and "recall wrote to memory" in session.error


class Counting(NoteAgent):
    def recall(self, item: Item, memory: Memory) -> tuple[list[Retrieved], str]:
        scope = Scope(MemoryKind.HISTORY, "shop")
        found = memory.retrieve("how long ?", 1, scope)
        return found, f"similar {memory.count_similar(item.question, 0.46, scope)}"


def test_what_another_query_found_stays_in_a_count() -> None:
    """Nobody knows how similar it is to this one."""
    plain = notes_executor(EARLY)
    spec = AgentSpec(
        "counting",
        (ActionSpec(Fn.RETRIEVE_MEMORY, "Look.", (Fn.PREDICT_ANSWER,)), *EARLY.actions[-2:]),
    )
    executor = Executor(Counting(spec=spec), make_codec("bpe", spec), {}, plain.desk, plain.score, counterfactual=True)
    session = play(executor, script(executor.codec, PREDICT), memory=ListMemory(MEMORY))
    assert [entry for entry, _ in session.retrieved] == [4]
    assert shown(executor, session) == "[RetrieveMemory]similar 3[PredictAnswer]"


@pytest.mark.parametrize("spec", [EARLY, NOTES])
def test_it_is_logged_and_replayed(spec: AgentSpec) -> None:
    executor = notes_executor(spec)
    entries: Sequence[MemoryItem] = [knowledge("steel is washable")]
    actions = (PREDICT,) if spec is EARLY else (Action(Fn.REFLECTION, "red"), PREDICT)
    session = play(executor, script(executor.codec, *actions), memory=ListMemory(entries))
    logged = session_from_json(json.loads(json.dumps(to_json(session))))
    assert logged == session and logged.counterfactual
    plain = Executor(executor.agent, executor.codec, executor.tools, executor.desk, executor.score)
    for player in (executor, plain):
        again = asyncio.run(replay_session(player, logged, item(), 0.0))
        assert again == logged, first_difference(logged, again, executor.codec)
