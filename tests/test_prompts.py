"""What a prompted model is told, word for word."""

from agile.prompts import choices, instructions, next_line, tool
from agile.types import ActionSpec, AgentSpec, Fn
from tests.worlds import NOTES

SPEC = AgentSpec(
    "guide",
    (
        ActionSpec(Fn.GET_QUESTION, "Read the question.", ("Look", Fn.SEEK_ADVICE, Fn.PREDICT_ANSWER)),
        ActionSpec("Look", "Look a word up.", (Fn.SEEK_ADVICE, Fn.PREDICT_ANSWER), takes_argument=True),
        ActionSpec(Fn.SEEK_ADVICE, "Ask somebody.", (Fn.REFLECTION,)),
        ActionSpec(Fn.REFLECTION, "Say what you learned.", (Fn.UPDATE_MEMORY,), takes_argument=True),
        ActionSpec(Fn.UPDATE_MEMORY, "Remember it.", (Fn.PREDICT_ANSWER,)),
        ActionSpec(Fn.PREDICT_ANSWER, "Answer in a word.", (Fn.SUBMIT_ANSWER,), takes_argument=True),
        ActionSpec(Fn.SUBMIT_ANSWER, "Hand it in.", ()),
    ),
)
TEXT = """\
You are the agent guide. A session goes step by step: you choose an action, and what it brings back is shown to you \
before you choose the next.

Actions that you choose:
- [Look] argument: Look a word up. Then: [SeekAdvice] or [PredictAnswer].
- [SeekAdvice]: Ask somebody. Then: [Reflection].
- [PredictAnswer] argument: Answer in a word. Then: [SubmitAnswer].

Actions whose argument you are asked for:
- [Reflection] argument: Say what you learned. Then: [UpdateMemory].

Actions that happen by themselves:
- [GetQuestion]: Read the question. Then: [Look] or [SeekAdvice] or [PredictAnswer].
- [UpdateMemory]: Remember it. Then: [PredictAnswer].
- [SubmitAnswer]: Hand it in.

Score of a session: 1 if the answer is right, 0 if it is wrong. Advice costs 0.3. An expert's answer counts as right, \
so a session with advice scores 0.7: ask only if you are less than 70 % sure of your own answer. An expert is asked \
at most once a session. What is written to memory after advice is shown in later sessions, which then need not ask.

"""
AS_TEXT = """\
Format: every turn is exactly one action: its name in brackets and, if it takes one, its argument on the same line, \
such as `[Look] argument`. Write nothing before or after it. The last line that you are shown says which actions may \
come next."""
AS_TOOLS = "Format: every turn is exactly one call of one of the tools that are offered, without other text."


def test_instructions() -> None:
    assert instructions(SPEC, 0.3, hints=True) == TEXT + AS_TEXT
    assert instructions(SPEC, 0.3) == (TEXT + AS_TEXT).partition(" The last line")[0]
    assert instructions(SPEC, 0.3, native=True, hints=True) == TEXT + AS_TOOLS


def test_an_agent_without_experts_hears_nothing_of_prices() -> None:
    text = instructions(NOTES, 0.3)
    assert "Advice costs" not in text and "expert" not in text
    assert choices(NOTES) == (Fn.GET_QUESTION, Fn.REFLECTION, "Add", Fn.PREDICT_ANSWER)


def test_next_line() -> None:
    assert next_line(SPEC, ("Look", Fn.SEEK_ADVICE)) == "Next: [Look] argument, or [SeekAdvice]"


def test_tools_have_a_schema() -> None:
    argument = {"type": "string", "description": "The text that the action takes."}
    look, ask = tool(SPEC, "Look")["function"], tool(SPEC, Fn.SEEK_ADVICE)["function"]
    assert (look["name"], look["description"]) == ("Look", "Look a word up.")
    assert look["parameters"]["properties"] == {"argument": argument}
    assert look["parameters"]["required"] == ["argument"]
    assert ask["parameters"] == {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
