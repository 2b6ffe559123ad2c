"""Texts that sessions of every agent can show, to train a tokenizer on."""

from __future__ import annotations

from agile.types import AgentSpec


def words_of_all(spec: AgentSpec, *, show_price: bool) -> list[str]:
    """Advice that never came, what the executor says of actions that it cannot take, their names, and prices.

    Args:
        show_price: Whether the agent is told what advice costs.
    """
    texts = ["no advice ( timeout refused failed )", "error : expected one of did not end takes no argument"]
    texts += ["holds another action", *(action.name for action in spec.actions)]
    if show_price:
        texts.append("advice costs " + " ".join(f"{percent / 100:.2f}" for percent in range(1, 101)))
    return texts
