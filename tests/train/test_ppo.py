"""PPO: the first ratio is 1, lineage, cutting a batch changes nothing, and an agent learns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agile.batching import make_batch, micro_batches, minibatches
from agile.engine import Engine
from agile.errors import AgileError
from agile.losses import PPOCoefficients, token_logprobs
from agile.model import ActorCritic
from agile.policies import HFPolicy
from agile.reference import Reference
from agile.train.kl import KLControl
from agile.train.ppo import Discounts, lay_out, lineage_terms, score_rows, train_ppo, update
from agile.types import SegmentEnd, SessionStatus, Trajectory
from tests.doors import (
    Gradients,
    actor_critic,
    largest_difference,
    llama,
    rollouts,
    segment,
    session,
    totals,
    weights,
)

TERMINATED, TRUNCATED, CLEARED = SegmentEnd.TERMINATED, SegmentEnd.TRUNCATED, SegmentEnd.CONTEXT_CLEARED
COEFFICIENTS = PPOCoefficients(kl_coef=0.1, entropy_coef=0.01)
POLICY_AND_VALUE = PPOCoefficients(kl_coef=0.0)


@cache
def played(temperature: float = 1.0) -> list[Trajectory]:
    return rollouts(llama(), temperature=temperature)


def learn(engine: Engine, trajectories: Sequence[Trajectory], **changes: Any) -> dict[str, float]:
    """One `update` on all there is, as one batch, once."""
    arguments = {
        "discounts": Discounts(),
        "coefficients": COEFFICIENTS,
        "batch_size": 1000,
        "micro_batch_tokens": 80,
        "num_epochs": 1,
        "temperature": 1.0,
        "rng": np.random.default_rng(0),
        "reference": Reference(ActorCritic(llama(1))),
        "rewards": totals(trajectories),
        **changes,
    }
    return update(engine, arguments.pop("reference"), trajectories, arguments.pop("rewards"), **arguments)


def test_the_rollouts_hold_every_kind_of_segment() -> None:
    rows, _ = lay_out(played(), totals(played()))
    assert {row.end for row in rows} == set(SegmentEnd)
    assert any(row.num_actions == 0 and row.end is TRUNCATED for row in rows)
    assert len({s.status for t in played() for s in t.sessions}) == 3
    assert {reward for rewards in totals(played()) for reward in rewards} == {0.0, 1.0}


# --------------------------------------------------------------------------------------------------------------------
# Log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trainer_and_rollout_agree_on_logprobs(temperature: float) -> None:
    rows, _ = lay_out(played(temperature), totals(played(temperature)))
    engine = Gradients(actor_critic())

    def difference(at: float) -> float:
        scored = score_rows(engine, None, rows, micro_batch_tokens=80, temperature=at)
        return max(float(np.abs(s.logprobs - r.logprobs).max(initial=0)) for s, r in zip(scored, rows, strict=True))

    assert difference(temperature) < 1e-4
    assert difference(1.7 - temperature) > 0.1, "at another temperature they do not"
    metrics = learn(engine, played(temperature), temperature=temperature)
    assert metrics["rollout_ratio"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratio_is_one(temperature: float) -> None:
    """For every token, however differently the batches are cut that score and that learn."""
    engine = Gradients(actor_critic())
    rows, _ = lay_out(played(temperature), totals(played(temperature)))
    scored = score_rows(engine, None, rows, micro_batch_tokens=50, temperature=temperature)
    for batch in minibatches(rows, 16, np.random.default_rng(0)):
        (micros,) = micro_batches(rows, batch, 30)
        for micro in micros:
            data = make_batch([rows[i] for i in micro], engine.device)
            logprobs = token_logprobs(engine.forward(data)[0], data.action_ids, temperature)
            old = torch.from_numpy(np.concatenate([scored[i].logprobs for i in micro]))
            assert float(((logprobs - old).exp() - 1).abs().max()) < 1e-5
    metrics = learn(engine, played(temperature), temperature=temperature, batch_size=16)
    assert metrics["first_ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-6), "nothing was changed in between"
    assert metrics["clip_fraction"] == 0


def test_the_ratio_moves_once_weights_do() -> None:
    model = actor_critic()
    metrics = learn(Engine(model, lr=1e-2), played(), batch_size=16, num_epochs=2)
    assert metrics["first_ratio"] == pytest.approx(1, abs=1e-6)
    assert abs(metrics["ratio"] - 1) > 1e-4
    assert metrics["approx_kl"] > 1e-4


def test_scores_are_of_the_states_before_each_token_and_after_the_last() -> None:
    model = actor_critic()
    rows, _ = lay_out(played(), totals(played()))
    reference = ActorCritic(llama(1))
    scored = score_rows(Gradients(model), Reference(reference), rows, micro_batch_tokens=70, temperature=0.7)
    for row, found in zip(rows, scored, strict=True):
        ids = torch.from_numpy(row.token_ids)[None]
        with torch.no_grad():
            values = model.value_head(model.lm.base_model(input_ids=ids).last_hidden_state[0])[:, 0].numpy()
            logprobs, ref = (lm(input_ids=ids).logits[0].div(0.7).log_softmax(-1) for lm in (model.lm, reference.lm))
        where = np.flatnonzero(row.action_mask) - 1
        np.testing.assert_allclose(found.values, values[where], atol=1e-5)
        np.testing.assert_allclose(found.logprobs, logprobs[where, row.action_ids], atol=1e-5)
        np.testing.assert_allclose(found.ref_logprobs, ref[where, row.action_ids], atol=1e-5)
        assert found.bootstrap == pytest.approx(values[-1], abs=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Lineage, and which sessions are learned from


def readers() -> Trajectory:
    """Session 0 writes entry 1; 1 and 3 read it, 2 reads it and fails."""
    step = segment([5, 6], [False, True], TERMINATED)
    read: dict[str, Any] = {"retrieved": ((1, 0.9), (7, 0.4)), "counterfactual": (9, 10, 11)}
    return Trajectory(
        "s",
        (
            session(segment([5, 7], [False, True], TERMINATED), written=(1,)),
            session(step, index=1, **read),
            session(step, index=2, status=SessionStatus.FAILED, **read),
            session(step, index=3, **{**read, "counterfactual": (12, 13)}),
        ),
    )


def test_lineage_compares_a_reader_to_the_value_of_its_first_decision_without_memory() -> None:
    model = actor_critic()

    def value(*ids: int) -> float:
        with torch.no_grad():
            hidden = model.lm.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            return float(model.value_head(hidden))

    one, three = value(9, 10, 11), value(12, 13)
    assert abs(one - three) > 0.01
    # half of each gain: entry 7 is of nobody here
    expected = 0.5 * (0.9 * (1 - one) + 0.9**3 * (0.5 - three))
    none = Trajectory("none", (session(segment([5, 6], [False, True], TERMINATED)),))
    found = lineage_terms(
        Gradients(model), [readers(), none], [[0, 1, 1, 0.5], [1]], discount=0.9, micro_batch_tokens=20
    )
    assert found[0] == pytest.approx([expected, 0, 0, 0], abs=1e-6) and found[1] == [0]
    unmasked = lineage_terms(
        Gradients(model), [readers()], [[0, 1, 1, 0.5]], discount=0.9, micro_batch_tokens=80, masked=()
    )
    assert unmasked[0][0] == pytest.approx(expected + 0.5 * 0.81 * (1 - one), abs=1e-6), "a failure, if it counts"


def test_lineage_moves_the_policy_as_a_reward_would_and_the_critic_not_at_all() -> None:
    """The policy's gradient is as if its terms had been rewards, the critic's as if there were none."""
    rewards = [[0.0, 1.0, 1.0, 0.5]]
    terms = lineage_terms(Gradients(actor_critic()), [readers()], rewards, discount=0.9, micro_batch_tokens=80)
    assert abs(terms[0][0]) > 0.01
    metrics, found = gradients([readers()], rewards=rewards, discounts=Discounts(lineage=0.9))
    assert metrics["lineage"] == pytest.approx(abs(terms[0][0]) / 4)
    uncredited, plain = gradients([readers()], rewards=rewards)
    _, paid = gradients([readers()], rewards=np.add(rewards, terms).tolist())
    assert metrics["explained_variance"] == uncredited["explained_variance"]
    for name, gradient in found.items():
        expected = plain if name.startswith("value_head") else paid
        torch.testing.assert_close(gradient, expected[name], atol=1e-7, rtol=1e-5)
    assert largest_difference(found, plain) > 1e-4
    alone, plain = gradients(played(), discounts=Discounts(lineage=0.9))
    assert alone["lineage"] == 0 and largest_difference(plain, gradients(played())[1]) == 0


@pytest.mark.parametrize("status", list(SessionStatus))
def test_which_ends_are_masked_is_a_rule(status: SessionStatus) -> None:
    """By default those that were not the policy's doing; with no rule, none."""
    ended = replace(played()[0].sessions[0], status=status)
    trajectories = [*played(), Trajectory("ended", (ended,))]
    rewards = [*totals(played()), [0.5]]
    without, _ = lay_out(played(), totals(played()))
    blameless = status is SessionStatus.FAILED or status.value.endswith("_timeout")
    assert (len(lay_out(trajectories, rewards)[0]) == len(without)) == blameless
    assert len(lay_out(trajectories, rewards, ())[0]) > len(without)
    assert len(lay_out(trajectories, rewards, (status,))[0]) < len(lay_out(trajectories, rewards, ())[0])


def test_without_a_sampled_token_there_is_nothing_to_learn_from() -> None:
    silent = session(segment([5, 6], [False, False], TRUNCATED), status=SessionStatus.TRUNCATED, error="too long")
    with pytest.raises(AgileError, match=r"nothing to learn from.*s/0: truncated, too long"):
        learn(Gradients(actor_critic()), [Trajectory("s", (silent,))], rewards=[[0.0]])
    with pytest.raises(AgileError, match="No stream has a question"):
        learn(Gradients(actor_critic()), [], rewards=[])


# --------------------------------------------------------------------------------------------------------------------
# Gradients


def gradients(trajectories: Sequence[Trajectory], **changes: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    engine = Gradients(actor_critic())
    metrics = learn(engine, trajectories, **changes)
    return metrics, engine.steps[0]


def test_batch_one_accumulated_eight_times_is_batch_eight() -> None:
    sessions = [s for t in played() for s in t.sessions][:8]
    trajectories = [Trajectory(s.stream_id, (s,)) for s in sessions]
    rows, _ = lay_out(trajectories, [[0.0]] * 8)
    assert len(rows) >= 8 and len({len(r) for r in rows}) > 2 and len({r.num_actions for r in rows}) > 2

    def step(tokens: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        model = actor_critic()
        rewards = [[float(i % 3)] for i in range(8)]
        metrics = learn(Engine(model, lr=1e-3), trajectories, rewards=rewards, batch_size=16, micro_batch_tokens=tokens)
        return metrics, weights(model)

    (many, ones), (one, eight) = step(1), step(1000)
    assert largest_difference(ones, eight) < 1e-6
    assert largest_difference(eight, weights(actor_critic())) > 1e-4
    assert many == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_cut_and_order_change_nothing() -> None:
    metrics, expected = gradients(played())
    other_metrics, other = gradients(played()[::-1], rewards=totals(played())[::-1], micro_batch_tokens=10_000)
    assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert largest_difference(other, expected) < 1e-6
    long = session(segment([4] * 60, [False] * 60, TRUNCATED), status=SessionStatus.TRUNCATED, stream_id="idle")
    idle_metrics, idle = gradients(
        [*played(), Trajectory("idle", (long,))], rewards=[*totals(played()), [5.0]], micro_batch_tokens=10_000
    )
    assert idle_metrics == pytest.approx({**metrics, "num_rows": metrics["num_rows"] + 1}, rel=1e-4, abs=1e-6)
    assert largest_difference(idle, expected) < 1e-6


def test_failed_sessions_change_nothing() -> None:
    failed = replace(played()[0].sessions[0], status=SessionStatus.FAILED)
    metrics, expected = gradients(played())
    more = [*played(), Trajectory("failed", (failed,))]
    other_metrics, other = gradients(more, rewards=[*totals(played()), [9.0]])
    assert other_metrics == metrics
    assert largest_difference(other, expected) == 0


def test_zero_advantage_gives_zero_policy_gradient() -> None:
    """Values of 0 and one reward for all: nothing is better than anything else. The critic learns, and it alone."""

    def norms(rewards: list[list[float]]) -> dict[str, float]:
        engine = Gradients(ActorCritic(llama()))
        learn(engine, played(), rewards=rewards, coefficients=POLICY_AND_VALUE, reference=None)
        return {name: float(grad.abs().max()) for name, grad in engine.steps[0].items()}

    equal = norms([[0.7] * len(t.sessions) for t in played()])
    assert max(norm for name, norm in equal.items() if name.startswith("lm.")) < 1e-12
    assert equal["value_head.2.bias"] > 0.1
    assert min(norm for name, norm in norms(totals(played())).items() if name.startswith("lm.")) > 1e-6


class Faulty(Engine):
    """Some of its passes for learning, by their number, end in NaN."""

    faults: Sequence[int] = ()
    num_passes = 0

    def forward(self, *args: Any) -> Any:
        logits, values, last = super().forward(*args)
        if torch.is_grad_enabled():
            self.num_passes += 1
            if self.num_passes in self.faults:
                logits = logits * math.nan
        return logits, values, last


def test_a_skipped_step_is_no_part_of_the_figures() -> None:
    engine = Faulty(actor_critic(), lr=1e-3)
    engine.faults = (1, 3)
    figures = learn(engine, played(), batch_size=8, micro_batch_tokens=10**6)
    assert engine.num_skipped == 2 < engine.num_passes
    assert all(math.isfinite(value) for value in figures.values()), figures
    assert figures["first_ratio"] == pytest.approx(1, abs=1e-5)
    assert 0 < figures["epochs"] < 1


def test_an_iteration_of_skipped_steps_says_so_and_leaves_the_weight_of_the_kl() -> None:
    engine, control, found = Faulty(actor_critic(), lr=1e-3), KLControl(0.1, target=0.01), []
    engine.faults = range(1, 100)
    run(
        engine.module,
        num_iterations=1,
        engine=engine,
        value_warmup_epochs=0,
        num_epochs=1,
        batch_size=1000,
        micro_batch_tokens=10**6,
        kl_control=control,
        on_iteration=lambda number, trajectories, figures: found.append(figures),
    )
    (figures,) = found
    assert figures["epochs"] == 0 and engine.num_skipped == engine.num_passes == 1
    assert all(math.isnan(figures[name]) for name in ("grad_norm", "approx_kl", "entropy", "policy"))
    assert control.coef == 0.1


def test_an_advantage_makes_what_was_done_likelier() -> None:
    """A plain step up the gradient raises the log-probability of the better session and lowers the other's."""
    good = session(segment([5, 6, 7], [False, True, True], TERMINATED))
    bad = session(segment([5, 8, 9], [False, True, True], TERMINATED), index=1)
    trajectories = [Trajectory("s", (good, bad))]
    model = ActorCritic(llama())
    rows, _ = lay_out(trajectories, [[1.0, 0.0]])

    def logprobs() -> list[float]:
        scored = score_rows(Gradients(model), None, rows, micro_batch_tokens=20, temperature=1.0)
        return [float(s.logprobs.sum()) for s in scored]

    before = logprobs()
    learn(Engine(model, lr=1e-3), trajectories, rewards=[[1.0, 0.0]], coefficients=POLICY_AND_VALUE, reference=None)
    after = logprobs()
    assert after[0] > before[0] and after[1] < before[1]


# --------------------------------------------------------------------------------------------------------------------
# The loop


def run(
    model: ActorCritic,
    *,
    num_iterations: int,
    engine: Engine | None = None,
    shuffle: bool = False,
    seed: int = 0,
    lr: float = 3e-3,
    weight_decay: float = 0.0,
    **changes: Any,
) -> list[float]:
    """Train on the doors; returns the share of right doors of each iteration."""
    policy = HFPolicy(model.lm)
    scores: list[float] = []

    def collect(iteration: int) -> list[Trajectory]:
        return rollouts(model.lm, num_streams=16, num_items=4, max_turns=8, seed=1000 * seed + iteration)

    def rewards(trajectories: Sequence[Trajectory], rng: np.random.Generator) -> list[list[float]]:
        found = totals(trajectories)
        scores.append(float(np.mean(found)))
        return rng.permutation(np.ravel(found)).reshape(np.shape(found)).tolist() if shuffle else found

    arguments = {
        "first_iteration": 0,
        "value_warmup_epochs": 1,
        "discounts": Discounts(),
        "coefficients": PPOCoefficients(kl_coef=0.0),
        "batch_size": 32,
        "micro_batch_tokens": 512,
        "num_epochs": 2,
        "temperature": policy.temperature,
        "on_iteration": lambda *args: None,
        **changes,
    }
    train_ppo(
        engine or Engine(model, lr=lr, groups=model.parameter_groups(1e-2), weight_decay=weight_decay),
        None,
        collect=collect,
        rewards=rewards,
        num_iterations=num_iterations,
        seed=seed,
        **arguments,
    )
    return scores


def test_warm_up_trains_the_critic_alone() -> None:
    model = actor_critic()
    snapshots = [weights(model)]
    run(
        model,
        num_iterations=2,
        weight_decay=0.1,
        coefficients=COEFFICIENTS,
        on_iteration=lambda *args: snapshots.append(weights(model)),
    )
    for name in snapshots[0]:
        start, warm, end = (s[name] for s in snapshots)
        assert torch.equal(start, warm) == name.startswith("lm."), name
        assert not torch.equal(warm, end), name


def test_an_iteration_depends_on_the_seed_and_its_number_alone(tmp_path: Any) -> None:
    whole = actor_critic()
    run(whole, num_iterations=3)
    first, second = actor_critic(), actor_critic(5)
    engine = Engine(first, lr=3e-3, groups=first.parameter_groups(1e-2))
    run(first, num_iterations=2, engine=engine)
    engine.save(tmp_path, "two")
    engine = Engine(second, lr=3e-3, groups=second.parameter_groups(1e-2))
    engine.load(tmp_path, "two")
    run(second, num_iterations=3, engine=engine, first_iteration=2)
    assert largest_difference(weights(whole), weights(second)) == 0
    assert largest_difference(weights(whole), weights(first)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_agent_learns_which_door_is_right_and_nothing_from_shuffled_rewards(seed: int) -> None:
    """The reward comes a segment after the choice that earns it; a policy that ignores the sign gets a half."""
    learned = run(ActorCritic(llama(seed, hidden_size=32, scale=1.0)), num_iterations=24, seed=seed)
    control = run(ActorCritic(llama(seed, hidden_size=32, scale=1.0)), num_iterations=24, seed=seed, shuffle=True)
    assert np.mean(learned[:2]) < 0.4
    assert np.median(learned[-5:]) > 0.9  # a median: one bad update, mended by the next, is not what is asked here
    assert np.median(control[-5:]) < 0.65
