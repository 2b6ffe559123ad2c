"""AGILE: train language-model agents that look up, remember, and ask people only when it is worth the price."""

__version__ = "0.1.0"
