"""A mailbox agent, which learns to search with the words that count, and to stop.

    pip install -c constraints.txt -e ".[serve]"
    python -m examples.mailbox runs/mailbox --seed 0

The agent has two tools, a full-text search and one that shows a mail. A Llama of 0.1 million parameters first imitates
a clumsy searcher, who searches for any words that mails hold and goes on when it has the answer. Then it learns,
GRPO over groups of the same question; every question has a mailbox of its own, in training and in tests. A right answer
is worth 1, less 0.1 for every search; a wrong one is worth nothing.
"""

from random import Random

from agile.gateway import OpenTrajectory
from agile.tasks.games import mailbox as game
from agile.tools.mailbox import Mailbox
from examples.harness import GRPO, Conversation, Example, main

MAX_CALLS, MAX_HITS = 4, 2
SEARCH_PRICE = 0.1
CALL = '<tool_call>{"name":"NAME","arguments":{"ARGUMENT":"', '"}}</tool_call>'  # one word each, around what is typed
TEMPLATE = """\
{% for m in messages %}{{- '<|im_start|> ' + m.role + ' ' + m.content + ' ' }}\
{% for call in m.tool_calls or [] %}{% for key, value in call.function.arguments.items() %}\
{{- '<tool_call>{"name":"' + call.function.name + '","arguments":{"' + key + '":" ' + value | trim }}\
{{- ' "}}</tool_call> ' }}{% endfor %}{% endfor %}{{- '<|im_end|> ' }}{% endfor %}\
{% if add_generation_prompt %}{{- '<|im_start|> assistant ' }}{% endif %}"""


def meet(rng: Random) -> tuple[Mailbox, game.Question]:
    mails = game.write_mails(rng)
    return Mailbox(mails, max_hits=MAX_HITS), game.ask(mails, rng)


async def answer(t: OpenTrajectory, name: str) -> tuple[bool, int]:
    """Whether the agent's answer is right, and how often it searched; after too many calls it has none."""
    mailbox, question = meet(Random(name))
    messages: Conversation = [{"role": "user", "content": question.text}]
    num_searches = 0
    for _ in range(MAX_CALLS + 1):
        messages.append(await t.chat(messages, tools=game.TOOLS, max_tokens=6))  # as t.client does over HTTP
        if not (calls := messages[-1].get("tool_calls")):
            return messages[-1]["content"] == question.answer, num_searches
        for call in calls:
            function = call["function"]
            num_searches += function["name"] == game.SEARCH
            shown = game.respond(mailbox, function["name"], function["arguments"])
            messages.append({"role": "tool", "content": shown})
    return False, num_searches


async def play(t: OpenTrajectory, name: str) -> float:
    right, num_searches = await answer(t, name)
    return right * (1 - SEARCH_PRICE * num_searches)  # were a wrong answer cheaper without a search, it would guess


async def measure(t: OpenTrajectory, name: str) -> dict[str, float]:
    right, num_searches = await answer(t, name)
    return {"right": 100.0 * right, "searches": float(num_searches)}


def demonstrate(num: int, rng: Random) -> list[Conversation]:
    """Conversations of a clumsy searcher."""
    return [game.clumsy(*meet(rng), rng, max_calls=MAX_CALLS) for _ in range(num)]


def words() -> list[str]:
    """All that is read and written."""
    opening, closing = CALL
    calls = [opening.replace("NAME", name).replace("ARGUMENT", argument) for name, argument in game.ARGUMENTS.items()]
    texts = " ".join([*game.QUESTIONS, game.BODY, game.NONE, game.BAD_CALL]).split()
    numbers = [str(id) for id in range(1, game.NUM_MAILS + 1)]
    known = [*game.PEOPLE, *game.TOPICS, *game.EVENTS, *game.MONTHS, *numbers, "tool", "|", *calls, closing]
    return list(dict.fromkeys([*known, *(word for word in texts if "{" not in word)]))


EXAMPLE = Example(
    about=__doc__,
    words=words(),
    context=256,
    template=TEMPLATE,
    tools=game.TOOLS,
    demonstrate=demonstrate,
    num_demonstrations=4000,
    imitation_steps=1000,
    play=play,
    measure=measure,
    figures={
        "sampled/right": "right answers, %",
        "sampled/searches": "searches per question",
        "greedy/right": "right answers, %, greedy",
        "greedy/searches": "searches per question, greedy",
    },
    learner={"ppo": {**GRPO, "batch_size": 32, "lr": 5e-4, "num_epochs": 1}},
    num_steps=40,
    groups=16,
    size=8,
    num_tests=60,
    test_every=10,
)

if __name__ == "__main__":
    main(EXAMPLE)
