"""MiniShop: what a generated world promises to those who learn in it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from agile.baselines import oracle
from agile.errors import AgileError
from agile.tasks import minishop
from agile.tasks.minishop import BALANCED_FACTS, SKEWED_FACTS, MiniShopSpec, write_minishop
from agile.tasks.productqa import ProductQA
from agile.types import Item, Stream

SMALL = MiniShopSpec(num_train_worlds=2, num_test_worlds=1, num_questions=12)
MANY = MiniShopSpec(num_train_worlds=60, num_test_worlds=2)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ProductQA:
    folder = tmp_path_factory.mktemp("minishop") / "many"
    write_minishop(folder, MANY, seed=3)
    return ProductQA(folder)


@pytest.fixture(scope="module")
def streams(task: ProductQA) -> list[Stream]:
    return [*task.streams("train"), *task.streams("test")]


@pytest.fixture(scope="module")
def items(streams: Sequence[Stream]) -> list[Item]:
    return [item for stream in streams for item in stream.items]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# --------------------------------------------------------------------------------------------------------------------
# Files


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 7), ("two", 7), ("three", 8)):
        write_minishop(tmp_path / name, SMALL, seed)
    one, two, three = (digests(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one.keys() == three.keys() and len(one) == 10
    assert all(one[name] != three[name] for name in one if "schema" not in name)


def test_a_world_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    write_minishop(tmp_path / "one", MiniShopSpec(1, 0, 12), 7)
    write_minishop(tmp_path / "two", SMALL, 7)
    few, more = digests(tmp_path / "one"), digests(tmp_path / "two")
    assert {name for name in few if few[name] != more[name]} == {"product_qa.db"}


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    write_minishop(tmp_path / "shop", SMALL, 0)
    assert sorted(os.listdir(tmp_path / "shop")) == ["product_qa.db", "test", "train"]
    assert os.listdir(tmp_path) == ["shop"]


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(AgileError, match=r"is not an empty folder\. Choose another"):
            write_minishop(out, SMALL, 0)
    with pytest.raises(AgileError, match=r"Cannot write MiniShop's worlds to .*file/shop: "):
        write_minishop(tmp_path / "file" / "shop", SMALL, 0)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    products, worlds = minishop._products, []

    def interrupted(*args: object) -> object:
        worlds.append(1)
        if len(worlds) == 3:
            raise error
        return products(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(minishop, "_products", interrupted)
    with pytest.raises(AgileError if isinstance(error, OSError) else KeyboardInterrupt):
        write_minishop(tmp_path / "shop", SMALL, 0)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("shares", [{"search": 0.5}, {"search": -0.1, "metadata": 0.37}])
def test_shares_must_be_shares(tmp_path: Path, shares: dict[str, float]) -> None:
    with pytest.raises(AgileError, match="must be at least 0 and add up to 1"):
        write_minishop(tmp_path / "shop", MiniShopSpec(**shares), 0)  # type: ignore[arg-type]


def test_shares_may_be_rounded(tmp_path: Path) -> None:
    third = 0.3333333
    spec = MiniShopSpec(1, 1, 12, search=third, metadata=third, history=third, knowledge=0, skewed=0)
    write_minishop(tmp_path / "shop", spec, 0)


# --------------------------------------------------------------------------------------------------------------------
# Worlds


def test_kinds_come_as_often_as_the_spec_says(items: Sequence[Item]) -> None:
    """Within four standard deviations."""
    counts = Counter(item.kind for item in items)
    assert {*counts} == {*MANY.kinds()}
    for kind, share in MANY.kinds().items():
        deviation = (share * (1 - share) / len(items)) ** 0.5
        assert counts[kind] / len(items) == pytest.approx(share, abs=4 * deviation)


def test_gold_sql_is_right_on_every_search_question(task: ProductQA, items: Sequence[Item]) -> None:
    searches = [item for item in items if item.kind == "search"]
    for item in searches:
        answer = task.tool_answer(item)
        assert task.is_correct(item, answer, used_search=True), (item.question, answer, item.answer)
    empty = sum(not item.answer for item in searches) / len(searches)
    assert 0.02 < empty < 0.4, "some searches find nothing, most find something"
    hidden = [
        a for item in searches for a in item.answer if a not in {i.product for i in items if i.group == item.group}
    ]
    assert hidden, "searches need the table: what they find is not all in prompts"


def test_metadata_hold_the_answers_that_they_should(items: Sequence[Item]) -> None:
    for item in items:
        if item.kind == "metadata":
            attribute = item.question.split()[1]
            assert item.context["metadata"][attribute] == item.answer


def facts(items: Sequence[Item], kind: str) -> dict[tuple[str, str], Item]:
    """One item for every fact that is asked about."""
    return {(item.group, item.context["settled_by"]): item for item in items if item.kind == kind}


def test_what_is_settled_stays_settled(streams: Sequence[Stream]) -> None:
    """Within a world, a key has one answer; across worlds it may have another."""
    across: dict[str, set[str]] = defaultdict(set)
    for stream in streams:
        answers: dict[str, set[str]] = defaultdict(set)
        for item in stream.items:
            if item.kind not in ("search", "metadata"):
                answers[item.context["settled_by"]].add(item.answer)
                across[item.context["settled_by"]].add(item.answer)
        assert all(len(found) == 1 for found in answers.values())
    assert sum(len(found) == 2 for found in across.values()) > len(across) / 3


def test_keys_name_the_product_or_the_rule(items: Sequence[Item]) -> None:
    for item in items:
        match item.kind:
            case "history" | "skewed":
                assert item.context["settled_by"] == f"{item.product}/{item.question.split()[2]}"
            case "knowledge":
                use, material = item.context["settled_by"].split("/")
                assert item.question == f"is it good for {use} ?"
                assert item.context["metadata"]["material"] == material
                assert item.context["knowledge"] == f"{material} for {use} : {item.answer}"


@pytest.mark.parametrize("kind", ["history", "knowledge", "skewed"])
def test_priors_are_what_the_items_say(items: Sequence[Item], kind: str) -> None:
    """How often the guess is right, over facts (not over questions, for some recur): four standard deviations."""
    found = facts(items, kind)
    (prior,) = {item.context["prior"] for item in found.values()}
    right = sum(item.context["guess"] == item.answer for item in found.values()) / len(found)
    assert prior == (0.95 if kind == "skewed" else 0.5)
    assert right == pytest.approx(prior, abs=4 * (prior * (1 - prior) / len(found)) ** 0.5)


def test_each_skewed_fact_leans_its_way(items: Sequence[Item]) -> None:
    for (_, key), item in facts(items, "skewed").items():
        assert item.context["guess"] == ("yes" if SKEWED_FACTS[key.split("/")[1]] > 0.5 else "no")
    asked = {key.split("/")[1] for _, key in facts(items, "history")}
    assert asked == {*BALANCED_FACTS}


def test_questions_recur(streams: Sequence[Stream]) -> None:
    """What was asked early pays later: of the questions that need an expert, many are settled before."""
    again = total = 0
    for stream in streams:
        seen: set[str] = set()
        for item in stream.items:
            if item.kind in ("history", "knowledge"):
                total += 1
                again += item.context["settled_by"] in seen
                seen.add(item.context["settled_by"])
    assert 0.25 < again / total < 0.75


def test_worlds_differ(task: ProductQA, streams: Sequence[Stream]) -> None:
    assert not {s.id for s in task.streams("train")} & {s.id for s in task.streams("test")}
    shops = {repr(sorted((i.product, sorted(i.context["metadata"].items())) for i in s.items)) for s in streams}
    questions = {tuple(i.question for i in s.items) for s in streams}
    assert len(shops) == len(questions) == len(streams)


def test_the_oracle_can_read_every_question(task: ProductQA) -> None:
    outcomes = oracle(task.streams("test"), 0.3, task)
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        by_kind[outcome.kind].append(outcome.advised)
    assert not any(by_kind["metadata"] + by_kind["search"] + by_kind["skewed"])
    assert 0 < sum(by_kind["history"]) < len(by_kind["history"])
