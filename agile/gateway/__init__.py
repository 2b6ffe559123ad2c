"""Capture: any agent that speaks OpenAI's API plays, token by token, and the model behind it learns from that."""

from agile.gateway.gateway import Gateway
from agile.gateway.trajectory import OpenTrajectory

__all__ = ["Gateway", "OpenTrajectory"]
