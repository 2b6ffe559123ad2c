"""What is measured for a report: every agent, ablation and baseline on the same test questions, at every price."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agile.build import Setup
from agile.calibration import Belief
from agile.config import RunConfig, load_config
from agile.errors import AgileError
from agile.evaluate import Outcome, best_of, outcomes, rates
from agile.expert_play import play_experts
from agile.instructive import instructive
from agile.memory_use import SIMILAR, Use, bearing, exact_uses, uses_by_similarity
from agile.own_answers import beliefs
from agile.play import Played, play_agent, play_prompted
from agile.show import describe
from agile.tasks.medmcqa import MedMCQA
from agile.tasks.scoring import unreadable
from agile.types import Item, Usage, to_json

By = dict[str, list[Outcome]]

FIRST = "Of {} alone are the sessions to read, details of agents and what experts are worth; all else is of all runs."


@dataclass(slots=True)
class Measured:
    """What a report is made of; of several runs it can be joined.

    Attributes:
        macro: Whether every stream counts alike, see `agile.protocols.Task`.
        groups: Ids of the test streams.
        published: Whether the paper's figures are about such questions.
        results: Outcomes of every agent and baseline at the config's price.
        ablations: Outcomes of the learned agent without something, by what is missing.
        prices: Both at other prices: `(results, ablations)` by price.
        own: Beliefs of the learned agents.
        uses: What memory did for agents that were played: by similarity, and exactly where the task knows.
        usages: What their completions took.
        seconds_of: How long each was played.
        costs: Money that an agent's expert and its judge took where these are models: `{agent: {expert, judge}}`.
        notes: What the report has to say of what was not played.
        seconds: Of each part of the work.
        details, examples, experts, skipped_rows: As the report holds them; of several runs those of the first.
    """

    macro: bool = False
    groups: tuple[str, ...] = ()
    published: bool = True
    results: By = field(default_factory=dict)
    ablations: By = field(default_factory=dict)
    prices: dict[float, tuple[By, By]] = field(default_factory=dict)
    own: dict[str, list[Belief]] = field(default_factory=dict)
    uses: dict[str, tuple[list[Use], list[Use]]] = field(default_factory=dict)
    usages: dict[str, Usage] = field(default_factory=dict)
    seconds_of: dict[str, float] = field(default_factory=dict)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    experts: dict[str, Any] = field(default_factory=dict)
    skipped_rows: list[Any] = field(default_factory=list)


def trained_config(run: Path) -> RunConfig:
    """The config that a run was trained with.

    Raises:
        AgileError: It is no run.
    """
    if not (run / "config.yaml").exists():
        raise AgileError(
            f"{run} is no run (it has no config.yaml). Give evaluate.checkpoint a folder of `agile train`."
        )
    return load_config(run / "config.yaml")


def trained_agents(config: RunConfig, trained: RunConfig) -> list[str]:
    """The agents to play of those that a run trains.

    Args:
        config: Names them, `evaluate.agents`.
        trained: Of the run.
    """
    names = [name for name in config.evaluate.agents if name in trained.stages]
    return [name for name in names if name != "ppo" or trained.ppo.num_iterations]


def measure(setup: Setup, out: Path, folders: Mapping[str, Path]) -> Measured:
    """Play all that the config names; sessions go to `<out>/test-<agent>.jsonl` and `<out>/ablations`.

    Args:
        folders: Of the trained agents.
    """
    config = setup.config.evaluate
    began = time.monotonic()
    streams = setup.task.streams("test")
    published = not (isinstance(setup.task, MedMCQA) and setup.task.medqa)
    found = Measured(setup.task.macro, tuple(stream.id for stream in streams), published)
    prompted = "prompted" in config.agents
    if folders or prompted:
        setup.embed(streams)
    found.seconds["embedding"] = time.monotonic() - began

    began = time.monotonic()
    runs = setup.baselines()
    found.seconds["baselines"] = time.monotonic() - began
    found.details = {n: {k: v for k, v in r.detail.items() if k != "sweep"} for n, r in runs.items() if r.detail}

    items = {(stream.id, item.id): item for stream in streams for item in stream.items}
    own: dict[str, dict[tuple[str, str], bool]] = {}
    for name in [*folders, *(["prompted"] * prompted)]:
        began = time.monotonic()
        if name in folders:
            played = play_agent(setup, folders[name], out / f"test-{name}.jsonl", probe=True)
        else:
            played = play_prompted(setup, out)
            found.details[name] = played.detail
        found.results[name] = outcomes(played.trajectories)
        found.usages[name], found.seconds_of[name] = played.usage, played.seconds
        found.uses[name] = uses_by_similarity(played.trajectories), exact_uses(played.trajectories, items)
        told = beliefs(played.sessions, items, played.codec, played.own_answers, setup.task)
        if name in folders:
            found.own[name] = told
            keys = {s.id: s.key for s in played.sessions}
            own[name] = {keys[belief.session_id]: belief.right for belief in told}
        if name == best_of([*folders, *(["prompted"] * prompted)]):
            found.examples = _examples(played, told, items)
        if said := {**unreadable(played.sessions), **setup.figures(played.trajectories)}:
            found.details[name] = {**found.details.get(name, {}), **said}
        costs = {"expert": played.expert_cost, "judge": float(said.get("judge cost", 0.0))}
        if any(costs.values()):
            found.costs[name] = costs
        found.seconds[name] = time.monotonic() - began
    experts = play_experts(setup, out)
    found.details |= experts.details
    found.seconds |= experts.seconds
    found.seconds_of |= experts.seconds | setup.baseline_seconds()
    found.costs |= {name: {"expert": cost, "judge": 0.0} for name, cost in experts.costs.items() if cost}
    if experts.asked:
        found.experts = experts.report(found.results, own, macro=found.macro)
    found.results |= experts.results | {name: run.outcomes for name, run in runs.items()}
    if skipped := setup.skipped:
        setup.tell_skipped()
        found.skipped_rows = skipped
        found.details["rows left out"] = {"number": len(skipped)}

    began = time.monotonic()
    if vain := _not_played(config.ablations, best_of(folders), found.results):
        found.notes.append(vain)
    found.ablations = _ablations(setup, out, folders, found.results)
    if found.ablations:
        found.seconds["ablations"] = time.monotonic() - began
    began = time.monotonic()
    for price in config.prices:
        found.prices[price] = _at_price(setup, out, folders, found, price)
    if config.prices:
        found.seconds["prices"] = time.monotonic() - began
    return found


def _not_played(ablations: Sequence[str], best: str | None, whole: By) -> str:
    """Which ablations have nothing to be taken from, and why; empty if all of them are played."""
    if ablations and best is None:
        return f"Ablations not played: {', '.join(ablations)}. They are about a trained agent, and none was scored."
    if "rl" in ablations and (best != "ppo" or "sft" not in whole):
        alone = "" if "sft" in whole else " without sft"
        return f"Ablation not played: rl. It sets sft beside ppo, and the report is about {best}{alone}."
    return ""


def _ablations(setup: Setup, out: Path, folders: Mapping[str, Path], whole: By, price: float | None = None) -> By:
    """The learned agent without each of `evaluate.ablations`, at the config's price or another one."""
    best = best_of(folders)
    if best is None:
        return {}
    found: By = {}
    advice_rate = float(rates(whole[best], 0.0)["advice_rate"])
    for ablation in setup.config.evaluate.ablations:
        if ablation == "rl":
            if best == "ppo" and "sft" in whole:  # else `_not_played` says so
                found["rl"] = whole["sft"]
            continue
        log = f"test-{best}-{ablation}" + ("" if price is None else f"-{price:g}")
        played = play_agent(
            setup,
            folders[best],
            out / "ablations" / f"{log}.jsonl",
            price=price,
            ablation=ablation,
            advice_rate=advice_rate,
        )
        found[ablation] = outcomes(played.trajectories)
    return found


def _at_price(setup: Setup, out: Path, folders: Mapping[str, Path], found: Measured, price: float) -> tuple[By, By]:
    """Agents, ablations and baselines at another price; agents that do not see it do what they did."""
    runs = setup.baselines(price)
    results: By = {}
    anew = setup.agent.show_price and price != setup.config.task.advice_price
    for name, played in found.results.items():
        if name in runs:
            results[name] = runs[name].outcomes
        elif anew and name in folders:
            log = out / f"test-{name}-{price:g}.jsonl"
            results[name] = outcomes(play_agent(setup, folders[name], log, price=price).trajectories)
        else:
            results[name] = played
    return results, _ablations(setup, out, folders, results, price) if anew else found.ablations


def _examples(played: Played, told: Sequence[Belief], items: Mapping[tuple[str, str], Item]) -> list[dict[str, Any]]:
    """The most instructive sessions, to read."""
    bore = {s.id: bearing(s, items[s.key], SIMILAR) for s in played.sessions}
    examples = []
    for chosen in instructive(played.sessions, {b.session_id: b for b in told}, bore):
        session = chosen.session
        view = to_json(describe(session, played.codec))
        gold = items[session.key].answer
        facts = [("why", chosen.why), ("gold", ", ".join(map(str, gold)) if isinstance(gold, list) else str(gold))]
        own = played.own_answers.get(session.id)
        if own is not None:
            facts.append(("would say", f"{own.text} ({own.confidence:.0%})"))
        examples.append({**view, "heading": chosen.heading, "facts": [*facts, *view["facts"]]})
    return examples


# --------------------------------------------------------------------------------------------------------------------
# Several runs


def joined(parts: Mapping[str, Measured], *, same_questions: bool) -> Measured:
    """What several runs measured as one: a question of each is another question.

    Args:
        parts: By the run's name, which is put before the ids of streams.
        same_questions: Whether all of them played the same ones: these say no more of other questions than one run.
    """

    def extend(whole: By, part: By, run: str) -> None:
        for name, found in part.items():
            whole.setdefault(name, []).extend(
                replace(o, stream_id=f"{run}/{o.stream_id}", questions=o.stream_id if same_questions else None)
                for o in found
            )

    first = next(iter(parts.values()))
    whole = Measured(first.macro, first.groups, first.published)
    for run, part in parts.items():
        extend(whole.results, part.results, run)
        extend(whole.ablations, part.ablations, run)
        for price, (results, ablations) in part.prices.items():
            kept = whole.prices.setdefault(price, ({}, {}))
            extend(kept[0], results, run)
            extend(kept[1], ablations, run)
        for name, told in part.own.items():
            whole.own.setdefault(name, []).extend(told)
        for name, (similar, exact) in part.uses.items():
            both = whole.uses.setdefault(name, ([], []))
            both[0].extend(similar)
            both[1].extend(exact)
        for name, usage in part.usages.items():
            whole.usages[name] = whole.usages.get(name, Usage()) + usage
        for name, costs in part.costs.items():
            mine = whole.costs.setdefault(name, dict.fromkeys(costs, 0.0))
            mine |= {who: mine[who] + cost for who, cost in costs.items()}
        for mine, other in ((whole.seconds_of, part.seconds_of), (whole.seconds, part.seconds)):
            for name, seconds in other.items():
                mine[name] = mine.get(name, 0.0) + seconds
    whole.details, whole.examples = first.details, first.examples
    whole.experts, whole.skipped_rows = first.experts, first.skipped_rows
    whole.notes = list(dict.fromkeys(note for part in parts.values() for note in part.notes))
    whole.notes.append(FIRST.format(next(iter(parts))))
    return whole
