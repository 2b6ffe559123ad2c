"""AGILE: train language-model agents that look up, remember, and ask people only when it is worth the price."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agile.gateway import Gateway
    from agile.learner import Learner
    from agile.loaded import load

__version__ = "0.1.0"
__all__ = ["Gateway", "Learner", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """`Gateway`, `Learner` and `load` are loaded when they are asked for: `import agile` alone must be quick."""
    if name == "Gateway":
        from agile.gateway import Gateway

        return Gateway
    if name == "Learner":
        from agile.learner import Learner

        return Learner
    if name == "load":
        from agile.loaded import load

        return load
    raise AttributeError(f"module 'agile' has no attribute {name!r}")
