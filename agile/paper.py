"""What the AGILE paper (arXiv 2405.14751v2) reports, where a report sets it beside what was measured."""

from __future__ import annotations

from typing import Any

SOURCE = "arXiv 2405.14751v2, ablations of agile-vic13b-ppo on ProductQA at c = 0.3"
WHOLE = (0.233, 0.854, 0.784)  # advice rate, accuracy, score
ABLATIONS = {
    "reflection": (0.270, 0.852, 0.771),
    "memory": (0.407, 0.876, 0.754),
    "advice": (0.0, 0.747, 0.747),
    "random_advice": (0.233, 0.812, 0.742),
    "tools": (0.492, 0.864, 0.717),
    "rl": (0.256, 0.843, 0.766),
}


def ablation_in_paper(name: str) -> dict[str, Any] | None:
    """Figures of an ablation and `difference` of its score to the whole agent's; None if the paper has none.

    >>> round(ablation_in_paper("memory")["difference"], 3)
    -0.03
    """
    if name not in ABLATIONS:
        return None
    advice_rate, accuracy, score = ABLATIONS[name]
    return {
        "advice_rate": advice_rate,
        "accuracy": accuracy,
        "score": score,
        "difference": score - WHOLE[2],
        "advice_difference": advice_rate - WHOLE[0],
        "source": SOURCE,
    }
