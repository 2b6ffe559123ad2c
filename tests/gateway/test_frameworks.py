"""Agents written with LangGraph and with the OpenAI Agents SDK, as their users write them, behind the gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agile.batching import session_rows
from agile.gateway import Gateway
from agile.learner import Learner
from tests.gateway.agents import call, gateway, said, sampled, tell

pytestmark = pytest.mark.frameworks
QUESTION = "is it washable ?"
SAYS = call("look", of="pan"), call("look", of="pot"), "yes"


async def with_langgraph(base_url: str, api_key: str) -> str:
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from langgraph.graph import START, MessagesState, StateGraph
    from langgraph.prebuilt import ToolNode, tools_condition

    @tool  # type: ignore[untyped-decorator]
    def look(of: str) -> str:
        """Look something up."""
        return f"{of} is steel"

    model = ChatOpenAI(model="agile", base_url=base_url, api_key=api_key).bind_tools([look])

    async def think(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("think", think)
    graph.add_node("tools", ToolNode([look]))
    graph.add_edge(START, "think")
    graph.add_conditional_edges("think", tools_condition)
    graph.add_edge("tools", "think")
    state = await graph.compile().ainvoke({"messages": [("user", QUESTION)]})
    return str(state["messages"][-1].content)


async def with_the_agents_sdk(base_url: str, api_key: str) -> str:
    from openai import AsyncOpenAI

    from agents import (  # noqa: TID251
        Agent,
        OpenAIChatCompletionsModel,
        Runner,
        function_tool,
        set_tracing_disabled,
    )

    @function_tool  # type: ignore[untyped-decorator]
    def look(of: str) -> str:
        """Look something up."""
        return f"{of} is steel"

    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=base_url, api_key=api_key)
    model = OpenAIChatCompletionsModel(model="agile", openai_client=client)
    result = await Runner.run(Agent(name="shop", model=model, tools=[look]), QUESTION)
    await client.close()
    return str(result.final_output)


@pytest.mark.parametrize("agent", [with_langgraph, with_the_agents_sdk])
def test_its_calls_are_one_segment_of_the_engines_own_tokens(learner: Learner, agent: Any) -> None:
    told = tell(learner, *SAYS)

    async def run(g: Gateway) -> str:
        async with g, g.trajectory() as t:
            answer: str = await agent(g.base_url, t.api_key)
            t.reward = 1.0
        return answer

    g = gateway(learner)
    assert asyncio.run(run(g)) == "yes"
    (session,) = g.ended
    assert len(session.segments) == 1 and sampled(session) == said(told) and len(told.calls) == 3
    (row,) = session_rows(session)
    assert row.num_actions == sum(len(c.token_ids) for _, c in told.calls)
    shown = learner.tokenizer.decode(session.segments[0].token_ids)
    assert "pan is steel" in shown and "pot is steel" in shown
