"""A report with every key that the page knows, made up."""

from __future__ import annotations

import math
from typing import Any

from agile.calibration import Belief, calibration
from agile.memory_use import Use, memory_use

PRICE = 0.3
AGENTS = {  # accuracy and advice rate, at the start and at the end of the stream
    "ppo": ((0.95, 0.955), (0.52, 0.21)),
    "sft": ((0.91, 0.925), (0.47, 0.28)),
    "oracle": ((0.975, 0.985), (0.40, 0.13)),
    "recall": ((0.95, 0.93), (0.62, 0.34)),
    "router": ((1.0, 1.0), (0.78, 0.79)),
    "always_ask": ((1.0, 1.0), (1.0, 1.0)),
    "never_ask": ((0.62, 0.63), (0.0, 0.0)),
}
KINDS = {"metadata": 0.1, "history": 0.4, "category": 0.35, "search": -0.35, "skewed prior": 0.05}


def summary(accuracy: float, advice_rate: float, n: int, price: float = PRICE) -> dict[str, Any]:
    accuracy, advice_rate = min(1.0, accuracy), min(1.0, max(0.0, advice_rate))
    return {"accuracy": accuracy, "advice_rate": advice_rate, "score": accuracy - price * advice_rate, "n": n}


def made_up_agent(accuracy: tuple[float, float], advice: tuple[float, float], salt: int) -> dict[str, Any]:
    """Rates that move from the first to the second, most of the way early, with a little deterministic noise."""
    parts = []
    for k in range(10):
        share = 1 - math.exp(-k / 3)
        noise = 0.012 * math.sin(5 * k + salt) if 0 < advice[0] < 1 else 0
        right, asks = (start + share * (end - start) + noise for start, end in (accuracy, advice))
        parts.append({"from": k / 10, "to": (k + 1) / 10, **summary(right, asks, 240)})
    mean = [sum(part[key] for part in parts) / len(parts) for key in ("accuracy", "advice_rate")]
    whole = summary(mean[0], mean[1], 2400)
    by_type = {}
    for kind, extra in KINDS.items():
        fixed = mean[1] in (0, 1)
        by_type[kind] = summary(mean[0] - extra / 9, mean[1] + (0 if fixed else extra), n=480)
    interval = [whole["score"] - 0.011, whole["score"] + 0.01]
    return {**whole, "score_ci": interval, "failed": 3 * (salt < 2), "by_type": by_type, "by_position": parts}


def made_up_measurements() -> dict[str, Any]:
    """What a bench adds to agents: ablations, seeds, calibration, memory."""
    differences = {"memory": -0.05, "advice": -0.12, "random_advice": -0.02, "tools": -0.08, "reflection": 0.004,
                   "poisoned_memory": -0.01, "rl": -0.042}  # fmt: skip
    rows = {}
    for name, difference in differences.items():
        paper = None if name == "poisoned_memory" else {"difference": -0.03, "source": "arXiv 2405.14751v2"}
        ends = [difference - 0.02, difference + 0.02]
        prices = {f"{c:g}": {**summary(0.9, 0.2, 2400, c), "difference": difference * c} for c in (0.1, 0.3, 0.5)}
        verdict = "against the paper" if difference > 0 else "as in the paper"
        row = {"score_ci": ends, "failed": 0, "by_type": {}, "difference": difference, "ci": ends, "p": 0.01}
        rows[name] = {**summary(0.9, 0.2, 2400), **row, "paper": paper, "verdict": verdict, "prices": prices}
    told = [Belief("s", "fact", k % 7 == 0, (37 * k % 100) / 100, k / 200, 53 * k % 200 < k) for k in range(200)]
    uses = [Use(list(KINDS)[k % 5], k, 200, k % 3 > 0, k % 2 > 0, k % 5 == 0, k % 4 > 0) for k in range(200)]
    runs = [{"run": f"seed-{k}", "seed": k, **summary(0.9, 0.3 + k / 100, 800)} for k in range(3)]
    figures = {"runs": runs, "mean": summary(0.9, 0.31, 800), "spread": {"accuracy": 0.0, "score": 0.003}}
    expert = {"expert": "tired-doctor", "accuracy": 0.9, "answered": 1.0, "unreadable": 0.0, "price": 0.3}
    gain = {"agent": "never_ask", "expert": "tired-doctor", **summary(0.9, 1.0, 2400), "gain": 0.1, "worth_below": 0.4}
    gain["price"] = PRICE
    figures_of_others = {"table": "ProductQA", "measure": "short answer", "source": "arXiv 2405.14751v2"}
    row = {"agent": "agile-vic13b-ppo", "price": PRICE, "advice_rate": 0.233, "accuracy": 0.854, "score": 0.784}
    row |= {"groups": ["camera_cases", "leggings", "all_pans"], "same_questions": False}
    one = {"agent": "agile-vic13b-ppo", "price": PRICE, "advice_rate": None, "accuracy": None, "score": 0.781}
    one |= {"groups": ["camera_cases"], "table": "ProductQA, by group", "same_questions": False}
    return {
        "published": [{**figures_of_others, **row}, {**figures_of_others, **one}],
        "envelope": {f"{PRICE:g}": {"score": 0.8, "by": "recall", "published": False, "same_questions": True}},
        "ablations": {"agent": "ppo", "rows": rows},
        "experts": {"experts": [{**expert, "latency_s": None}], "gains": [gain]},
        "skipped_rows": ["qa.jsonl, line 9: bad"],
        "seeds": {"ppo": figures, "router": figures, "ppo memory": figures},
        "calibration": {name: calibration(told) for name in ("sft", "ppo")},
        "memory_use": {
            "ppo": {"similar": 0.46, "by_similarity": memory_use(uses), "exact": memory_use(uses)},
            "sft": {"similar": 0.46, "by_similarity": memory_use(uses), "exact": None},
        },
    }


def made_up_report() -> dict[str, Any]:
    """A report with every key that the page knows."""
    agents = {name: made_up_agent(*ends, salt=k) for k, (name, ends) in enumerate(AGENTS.items())}
    swept = {
        f"{c:g}": {
            n: summary(a["accuracy"], a["advice_rate"], 2400, c) for n, a in agents.items() if n not in ("ppo", "sft")
        }
        for c in (0.1, 0.2, 0.3, 0.4, 0.5)
    }
    sft = [{"step": 20 * k, "loss": 0.9 * math.exp(-k / 14) + 0.05 + 0.01 * math.sin(k)} for k in range(60)]
    ppo: list[dict[str, Any]] = []
    for k in range(25):
        accuracy, rate = (
            0.9 + 0.05 * (1 - math.exp(-k / 8)) + 0.004 * math.sin(3 * k),
            0.36 - 0.06 * (1 - math.exp(-k / 10)),
        )
        row = {"iteration": k, "accuracy": accuracy, "advice_rate": rate, "score": accuracy - PRICE * rate}
        rest = {
            "kl": 0.03 * (1 - math.exp(-k / 6)),
            "entropy": 0.3 - 0.005 * k,
            "explained_variance": 0.7 - 0.7 / (k + 1),
        }
        ppo.append(row | rest)
    difference = agents["ppo"]["score"] - agents["sft"]["score"]
    for name, agent in agents.items():
        agent["means"] = {
            key: {"accuracy": 0.9, "advice_rate": 0.4, "score": agent["score"]} for key in ("macro", "micro")
        }
        agent["means"]["micro"]["score"] += 0.01
        agent["expert_calls"] = round(2400 * agent["advice_rate"])
        if name in ("ppo", "sft"):
            agent["along_stream"] = [
                {"from": 200 * k, "to": 200 * k + 200, **summary(0.9, 0.5 - k / 40, 200)} for k in range(12)
            ]
            agent["seconds"] = 31.4
            agent["other_cost"] = {"expert": 1.25, "judge": 0.0}
            agent["usage"] = {"prompt_tokens": 90_000, "cached_tokens": 0, "completion_tokens": 9_000, "cost": 0.0}
    return {
        **made_up_measurements(),
        "task": "minishop",
        "advice_price": PRICE,
        "macro": True,
        "advice_counts": "always",
        "agents": agents,
        "seconds": {"worlds": 2.1, "imitation": 182.4, "ppo": 301.0, "evaluation": 74.2},
        "comparisons": [
            {
                "a": "ppo",
                "b": "sft",
                "difference": difference,
                "ci": [difference - 0.01, difference + 0.01],
                "p": 0.0005,
            },
            {"a": "ppo", "b": "recall", "difference": 0.052, "ci": [0.041, 0.063], "p": 0.0005},
            {"a": "sft", "b": "recall", "difference": 0.01, "ci": [-0.002, 0.02], "p": 0.12},
        ],
        "training": [*sft, *ppo],
        "prices": swept,
        "groups": {"camera_cases": swept, "leggings": swept},
        "details": {
            "recall": {
                "scope": "group",
                "threshold": 0.85,
                "sweep": [
                    {
                        "scope": scope,
                        "threshold": t,
                        "accuracy": 0.9 + t / 20,
                        "advice_rate": t / 2,
                        "score": 0.9 - t / 10,
                    }
                    for scope in ("product", "group")
                    for t in (0.75, 0.8, 0.85, 0.9)
                ],
            },
            "thresholds": "chosen on the test streams themselves, which favours recall",
        },
        "notes": ["A tiny model trained from scratch in minutes on two cores."],
        "examples": [
            {
                "heading": "Asked and need not have",
                "facts": [("why", "Made to answer it is right."), ("gold", "yes")],
                "title": "Question 3 of a stream: not known yet, so it asks, and writes down why",
                "spans": [
                    ("executor", "[GetQuestion]"),
                    ("task", "round 5 %\nproduct: kettle brand: arvo color: red\nquestion: does it whistle ?"),
                    ("executor", "[RetrieveMemory]"),
                    ("memory", "0.41 other product: does it fold ? no"),
                    ("llm", "[SeekAdvice]"),
                    ("advisor", "yes. kettles of steel whistle."),
                    ("executor", "[Reflection]"),
                    ("llm", "kettles of steel whistle"),
                    ("executor", "[UpdateMemory]\n"),
                    ("executor", "[PredictAnswer]"),
                    ("llm", "yes"),
                ],
            },
            [
                ("task", "question: which is the cheapest red kettle ?"),
                ("llm", "[SearchProduct] SELECT name FROM products WHERE color = 'red' ORDER BY price LIMIT 1"),
                ("tool", "arvo-7"),
                ("llm", "[PredictAnswer] arvo-7"),
            ],
        ],
    }
