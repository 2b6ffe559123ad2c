"""The example agents: what they are shown and say is in their vocabulary, and their rewards are what they did."""

import asyncio
from pathlib import Path
from random import Random
from typing import Any

import pytest

from agile.chat_format import ChatFormat, for_template
from agile.model import load_tokenizer
from agile.tasks.games import clues
from agile.tasks.games.game_2048 import possible
from agile.tasks.games.mailbox import tool_call
from agile.tasks.games.tictactoe import free
from examples import clues as clues_agent
from examples import game_2048, tictactoe
from examples import mailbox as mailbox_agent
from examples.harness import Example, make_model


class Says:
    """A trajectory whose policy says what it is told, in turn."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.messages = list(messages)
        self.shown: list[Any] = []

    async def chat(self, messages: list[Any], **_: Any) -> dict[str, Any]:
        self.shown = list(messages)
        return self.messages.pop(0)


def text(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


AGENTS = {"clues": clues_agent, "mailbox": mailbox_agent, "tictactoe": tictactoe, "2048": game_2048}


@pytest.mark.parametrize("example", [agent.EXAMPLE for agent in AGENTS.values()], ids=AGENTS)
def test_demonstrations_are_read_as_they_were_written(example: Example, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(make_model(tmp_path / "model", example, 0)))
    assert max(tokenizer.get_vocab().values()) < len(tokenizer), "a word stands twice in the vocabulary"
    chat = ChatFormat(tokenizer)
    for messages in example.demonstrate(10, Random(0)):
        pieces = chat.spoken([for_template(m) for m in messages], example.tools)
        ids = [i for _, part in pieces for i in part]
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= example.context
        said = [m for m in messages if m["role"] == "assistant"]
        for message, sampled in zip(said, [part for own, part in pieces if own], strict=True):
            answer = chat.answer([], sampled, tools=example.tools is not None)
            calls = [call["function"] for call in message.get("tool_calls", [])]
            assert [c[0] for c in answer.tool_calls] == [c["name"] for c in calls]
            assert answer.content == message["content"]
            for (_, arguments), call in zip(answer.tool_calls, calls, strict=True):
                assert all(value in arguments for value in call["arguments"].values())


def played(agent: Any, name: str, *messages: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """The reward and the figures of an agent that says this."""
    both = [asyncio.run(does(Says(*messages), name)) for does in (agent.play, agent.measure)]
    return both[0], both[1]


def test_an_answer_to_a_puzzle_is_worth_its_right_parts() -> None:
    who, where, when = clues.generate(Random("a")).answer
    wrong = next(place for place in clues.WHERE if place != where)
    assert played(clues_agent, "a", text(f"{who} {where} {when}")) == (1, {"all": 100, "parts": 100})
    reward, figures = played(clues_agent, "a", text(f"{who} {wrong} {when}"))
    assert (reward, figures) == (2 / 3, {"all": 0, "parts": pytest.approx(200 / 3)})


def test_a_right_answer_is_worth_1_and_every_search_takes_from_it() -> None:
    _, question = mailbox_agent.meet(Random("a"))
    search, read = tool_call("search", " ".join(question.keywords)), tool_call("read", f" {question.mail} ")
    right = text(question.answer)
    price = mailbox_agent.SEARCH_PRICE
    for says, num_searches, is_right in (
        ([search, read, right], 1, True),
        ([search, search, read, right], 2, True),
        ([right], 0, True),
        ([search, text("may not")], 1, False),
        ([tool_call("read", "all"), right], 0, True),
        ([search] * (mailbox_agent.MAX_CALLS + 1) + [right], mailbox_agent.MAX_CALLS + 1, False),
    ):
        reward, figures = played(mailbox_agent, "a", *says)
        assert reward == pytest.approx(is_right * (1 - price * num_searches))
        assert figures == {"right": 100 * is_right, "searches": num_searches}


def test_the_mail_that_was_found_and_read_holds_the_answer() -> None:
    _, question = mailbox_agent.meet(Random("b"))
    says = Says(tool_call("search", " ".join(question.keywords)), tool_call("read", str(question.mail)), text(""))
    t: Any = says
    asyncio.run(mailbox_agent.answer(t, "b"))
    shown = [m["content"] for m in says.shown if m["role"] == "tool"]
    assert str(question.mail) in shown[0].split() and question.answer in shown[1].split()


@pytest.mark.parametrize(
    ("said", "reward"),
    [(["x"], -0.5), (["1", "1"], -0.5), (["1", ""], -0.5), (["1", "2", "3"], 1.0), (["1", "2", "4"], 0.0)],
)
def test_a_game_is_worth_how_it_ends_and_a_move_that_is_none_loses_it(said: list[str], reward: float) -> None:
    def answers(board: str, who: str, rng: Random) -> int:
        """The highest free cell but one that the agent wants."""
        return max(cell for cell in free(board) if str(cell + 1) not in said)

    says: Any = Says(*map(text, said))
    assert asyncio.run(tictactoe.game(says, answers, Random(0))) == reward
    assert not says.messages


def test_2048_is_worth_its_score_and_shows_each_board_alone() -> None:
    rng, moves, hundreds = Random(0), 0, [0]

    class Plays(Says):
        async def chat(self, messages: list[Any], **_: Any) -> dict[str, Any]:
            nonlocal moves
            moves += 1
            (board,) = messages
            so_far, *words = board["content"].split()
            assert int(so_far.removeprefix("score-")) >= hundreds[-1], "it never falls"
            hundreds.append(int(so_far.removeprefix("score-")))
            assert words[16:] == possible(tuple(map(int, words[:16])))
            return text("left" if moves % 2 else "nothing")

    plays: Any = Plays()
    score = asyncio.run(game_2048.game(plays, rng))
    assert moves > 40 and score > 0 and score % 4 == 0 and score // 100 - hundreds[-1] in (0, 1)
