"""MiniShop: small generated worlds in the file format of ProductQA, for runs that take minutes on a CPU.

A world is a product group. Some of its questions are answered by what is shown (`metadata`), some by SQL over
products that are not (`search`), some only by an expert, once per product (`history`) or once per rule that holds for
every product of one material (`knowledge`), and some by a guess that is nearly always right (`skewed`), where asking
costs more than guessing. Questions recur, so what was asked early pays later. Lexicon and priors are the same in all
worlds, products and rules are drawn anew, so test worlds can be unseen worlds.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agile.errors import AgileError
from agile.tools.sql import write_products

ATTRIBUTES = {
    "brand": ("acme", "globex", "initech", "umbrella"),
    "color": ("red", "blue", "green", "black"),
    "material": ("steel", "wood", "plastic"),
    "size": ("small", "medium", "large"),
}
PRICES = (10, 20, 30, 40, 50)
BALANCED_FACTS = ("waterproof", "foldable", "washable", "stackable", "magnetic", "heavy")
SKEWED_FACTS = {  # the guess that is mostly right; the same in every world
    "returnable": True,
    "certified": True,
    "reusable": True,
    "toxic": False,
    "fragile": False,
    "refurbished": False,
}
USES = ("camping", "cooking", "travel", "gardening")
COLUMNS = {"price": "NUMERIC(10,2)", **dict.fromkeys(ATTRIBUTES, "VARCHAR(50)")}


@dataclass(frozen=True, slots=True)
class MiniShopSpec:
    """How large worlds are and how often each kind of question comes.

    Attributes:
        recurring: Whether what was asked about may be asked about again, or each fact and each rule at most once.
        guessable: How often the guess is right for the first, second and third of the facts that are mostly so, and of
            those that are mostly not.
    """

    num_train_worlds: int = 64
    num_test_worlds: int = 32
    num_questions: int = 40
    num_products: int = 5
    num_hidden_products: int = 12
    search: float = 0.15
    metadata: float = 0.12
    history: float = 0.28
    knowledge: float = 0.2
    skewed: float = 0.25
    recurring: bool = True
    guessable: tuple[float, float, float] = (0.95, 0.95, 0.95)

    def kinds(self) -> dict[str, float]:
        return {k: getattr(self, k) for k in ("search", "metadata", "history", "knowledge", "skewed")}


def write_minishop(out: Path, spec: MiniShopSpec, seed: int) -> None:
    """Write train and test worlds below `out`; the same spec and seed write the same files.

    Raises:
        AgileError: `out` exists and holds something else or cannot be written, or the shares do not add up to 1.
    """
    shares = spec.kinds()
    if min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise AgileError(f"MiniShop: the shares of question kinds {shares} must be at least 0 and add up to 1.")
    num_subjects = spec.num_products * (len(BALANCED_FACTS) + len(SKEWED_FACTS)) + len(USES) * len(
        ATTRIBUTES["material"]
    )
    if not spec.recurring and spec.search + spec.metadata == 0 and spec.num_questions > num_subjects:
        raise AgileError(
            f"MiniShop: {spec.num_questions} questions of which none recurs, but {spec.num_products} products and "
            f"their rules make at most {num_subjects}. Ask fewer, or raise num_products."
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise AgileError(f"{out} is not an empty folder. Choose another one for MiniShop's worlds, or remove it first.")
    try:
        _write_worlds(out, spec, seed)
    except OSError as error:
        raise AgileError(
            f"Cannot write MiniShop's worlds to {out}: {error.strerror or error}. Free space or choose another folder."
        ) from error


def _write_worlds(out: Path, spec: MiniShopSpec, seed: int) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        number = 0
        for split, count in (("train", spec.num_train_worlds), ("test", spec.num_test_worlds)):
            for _ in range(count):
                _write_world(draft, split, f"shop_{number:04d}", spec, np.random.default_rng([seed, number]))
                number += 1
        draft.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(draft, out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _write_world(root: Path, split: str, group: str, spec: MiniShopSpec, rng: np.random.Generator) -> None:
    products = _products(spec.num_products + spec.num_hidden_products, rng)
    write_products(root / "product_qa.db", group, COLUMNS, [{"asin": a, **p} for a, p in products.items()])
    folder = root / split / group
    folder.mkdir(parents=True)
    schema = {
        "price": {"type": "cloze", "unit": "dollar"},
        **{name: {"type": "choice", "choices": list(values)} for name, values in ATTRIBUTES.items()},
    }
    (folder / "schema.json").write_text(json.dumps(schema, indent=2))
    metadata = {a: {k: str(v) for k, v in p.items()} for a, p in products.items()}
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2))
    with (folder / "qa.jsonl").open("w") as file:
        for row in _questions(group, products, spec, rng):
            file.write(json.dumps(row) + "\n")


def _products(count: int, rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    names = [f"p{i}" for i in rng.permutation(count)]
    return {
        name: {
            "title": name,
            "price": int(rng.choice(PRICES)),
            **{attribute: str(rng.choice(values)) for attribute, values in ATTRIBUTES.items()},
        }
        for name in names
    }


def _questions(
    group: str, products: dict[str, dict[str, Any]], spec: MiniShopSpec, rng: np.random.Generator
) -> list[dict[str, Any]]:
    visible = list(products)[: spec.num_products]
    facts = {(p, f): bool(rng.random() < 0.5) for p in visible for f in BALANCED_FACTS}
    right = dict(zip(SKEWED_FACTS, 2 * spec.guessable, strict=True))
    share = {fact: right[fact] if guess else 1 - right[fact] for fact, guess in SKEWED_FACTS.items()}
    facts |= {(p, f): bool(rng.random() < share[f]) for p in visible for f in SKEWED_FACTS}
    rules = {(use, m): bool(rng.random() < 0.5) for use in USES for m in ATTRIBUTES["material"]}
    # some things are asked again and again, others once
    facts_by_rank = [str(f) for f in rng.permutation(BALANCED_FACTS)]
    popularity = _zipf(len(visible))
    shares = np.array(list(spec.kinds().values()))
    rows: list[dict[str, Any]] = []
    settled: set[str] = set()  # what was asked about, where nothing may be asked about again
    while len(rows) < spec.num_questions:
        kind = str(rng.choice(list(spec.kinds()), p=shares / shares.sum()))
        asin = str(rng.choice(visible, p=popularity))
        match kind:
            case "search":
                row = _search(products, rng)
            case "metadata":
                attribute = str(rng.choice([*ATTRIBUTES, "price"]))
                answer = str(products[asin][attribute])
                row = _fact(f"what {attribute} is it ?", answer, settled_by="", prior=1.0, guess=answer)
            case "history":
                fact = str(rng.choice(facts_by_rank, p=_zipf(len(facts_by_rank))))
                row = _fact(
                    f"is it {fact} ?", _yes(facts[asin, fact]), settled_by=f"{asin}/{fact}", prior=0.5, guess="yes"
                )
            case "skewed":
                fact = str(rng.choice(list(SKEWED_FACTS)))
                row = _fact(
                    f"is it {fact} ?",
                    _yes(facts[asin, fact]),
                    settled_by=f"{asin}/{fact}",
                    prior=right[fact],
                    guess=_yes(SKEWED_FACTS[fact]),
                )
            case _:
                use, material = str(rng.choice(USES)), products[asin]["material"]
                answer = _yes(rules[use, material])
                row = _fact(f"is it good for {use} ?", answer, settled_by=f"{use}/{material}", prior=0.5, guess="yes")
                row["type"] = "reasoning_qa"
                row["extra_data"]["knowledge"] = f"{material} for {use} : {answer}"
                row["long_answer"] = f"{answer} because {material} for {use} : {answer}"
        subject = row["extra_data"].get("settled_by")
        if subject and not spec.recurring:
            if subject in settled:
                continue
            settled.add(subject)
        row["extra_data"]["kind"] = kind
        rows.append({"id": f"{row['type']}_{len(rows)}", "asin": asin, **row})
    return rows


def _zipf(n: int) -> NDArray[np.float64]:
    """Shares of n things of which the k-th is asked about 1/k as often as the first."""
    weights = 1 / np.arange(1, n + 1)
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _fact(question: str, answer: str, **extra: Any) -> dict[str, Any]:
    return {
        "question": question,
        "short_answer": answer,
        "long_answer": answer,
        "type": "fact_qa",
        "extra_data": dict(extra),
    }


def _search(products: dict[str, dict[str, Any]], rng: np.random.Generator) -> dict[str, Any]:
    first, second = (str(a) for a in rng.permutation(list(ATTRIBUTES))[:2])
    value, other = (str(rng.choice(ATTRIBUTES[a])) for a in (first, second))
    match rng.integers(3):
        case 0:
            question = f"find me a {value} {other} one"
            where, order = f"{first} = '{value}' AND {second} = '{other}'", ""
            hits = [a for a, p in products.items() if p[first] == value and p[second] == other]
        case 1:
            limit = int(rng.choice(PRICES[1:]))
            question = f"find me a {value} one under {limit}"
            where, order = f"{first} = '{value}' AND price < {limit}", ""
            hits = [a for a, p in products.items() if p[first] == value and p["price"] < limit]
        case _:
            question = f"find me the cheapest {value} one"
            where, order = f"{first} = '{value}'", " ORDER BY price ASC"
            prices = [p["price"] for p in products.values() if p[first] == value]
            hits = [a for a, p in products.items() if p[first] == value and p["price"] == min(prices)]
    return {
        "question": question,
        "short_answer": [{"asin": a, "title": products[a]["title"]} for a in hits],
        "long_answer": hits[0] if hits else "none",
        "type": "search_qa",
        "extra_data": {"sql": f"SELECT product_id FROM products WHERE {where}{order} LIMIT 1"},
    }
