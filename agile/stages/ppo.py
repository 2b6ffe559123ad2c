"""The stage `ppo`: the policy plays the train streams and learns from what came of it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from agile import ranks
from agile.build import Setup
from agile.config import PPOConfig, RolloutConfig, RunConfig
from agile.copies import copies
from agile.credit import Estimator
from agile.engine import Engine
from agile.errors import AgileError
from agile.evaluate import outcomes, rates
from agile.executor import Executor
from agile.export import Trained
from agile.lag import Collector, staleness
from agile.losses import PPOCoefficients
from agile.model import ActorCritic
from agile.prices import priced
from agile.reference import adapter_free, frozen
from agile.rollout import collect, lengths, status_counts
from agile.run_folder import Place, RunFolder
from agile.seeding import derive_seed
from agile.stages.guard import VALIDATION_SCORE, Course, trouble
from agile.stages.progress import advance, progress_bar
from agile.stages.rewards import discounts, terminal_rewards
from agile.stages.validation import is_validated, validate
from agile.train.kl import KLControl
from agile.train.ppo import train_ppo
from agile.types import Session, Stream, Trajectory

logger = logging.getLogger(__name__)

# About twice what is seen in healthy runs in bfloat16: a mean ratio of 0.995, 7 % of the tokens outside [0.9, 1.1].
HEALTHY_RATIO = 0.02
HEALTHY_OUTSIDE = 0.15


def check_mismatch(rollout: RolloutConfig, iteration: int, mismatch: Mapping[str, float], *, exact: bool) -> None:
    """Whether rollout and trainer agree on how probable the sampled tokens were.

    Args:
        exact: Both compute in float32.

    Raises:
        AgileError: They do not although they have the same weights; nothing was learned from it yet.
    """
    difference = mismatch["rollout_difference"]
    if exact and rollout.lag == 0 and difference > rollout.max_difference:
        raise AgileError(
            f"Iteration {iteration + 1}: the logprobs of rollout.policy={rollout.policy} and of the trainer differ by "
            f"up to {difference:.3g} nats, expected at most {rollout.max_difference:g} (rollout.max_difference). The "
            "engine has other weights, or samples from a truncated or otherwise changed distribution. Nothing was "
            "learned from it: start the engine or its servers anew and go on with --resume."
        )
    ratio, outside = mismatch["rollout_ratio"], mismatch["rollout_outside"]
    if abs(ratio - 1) > HEALTHY_RATIO or outside > HEALTHY_OUTSIDE:
        logger.warning(
            "Iteration %d: rollout and trainer drift apart: mean ratio %.3f, %.0f %% of the tokens outside [0.9, 1.1] "
            "(healthy: within %g of 1, under %.0f %%). Lower rollout.lag, ppo.lr or ppo.num_epochs.",
            iteration + 1,
            ratio,
            100 * outside,
            HEALTHY_RATIO,
            100 * HEALTHY_OUTSIDE,
        )


def lr_factor(ppo: PPOConfig, iteration: int) -> float:
    """On the learning rates of an iteration, from 0: 1, or from 1 straight towards 0."""
    return 1 - iteration / ppo.num_iterations if ppo.lr_schedule == "linear" else 1.0


def ppo_engine(config: RunConfig, setup: Setup, tokenizer: PreTrainedTokenizerFast, start: Path) -> Engine:
    """The policy and its critic as PPO trains them, from the agent in the folder `start`."""
    ppo = config.ppo
    model = ActorCritic(setup.trained_model(tokenizer, start), config.model.critic)
    return Engine(
        model,
        **config.engine.model_dump(),
        lr=ppo.lr,
        groups=model.parameter_groups(ppo.value_lr),
        weight_decay=ppo.weight_decay,
        max_grad_norm=ppo.max_grad_norm,
        skip_above=config.guard.max_grad_norm,
        max_skipped=config.guard.max_skipped_steps,
    )


def reinforce(config: RunConfig, run: RunFolder, setup: Setup, executor: Executor) -> None:
    """Train the agent `sft` and a critic on its own sessions, from where the run stands; writes the agent `ppo`."""
    ppo, rollout, task = config.ppo, config.rollout, config.task
    kl_control = KLControl(ppo.kl_coef, ppo.kl_target)
    tokenizer = executor.codec.tokenizer
    torch.manual_seed(config.seed)
    engine = ppo_engine(config, setup, tokenizer, run.path / "sft")
    lm = engine.module.lm
    reference = None
    if ppo.kl_coef and config.lora:
        reference = adapter_free(engine)
    elif ppo.kl_coef:
        start = ActorCritic(setup.language_model(tokenizer, run.path / "sft"))
        reference = frozen(start, engine, offload=ppo.reference == "offload")
    done, course = 0, Course()
    if run.place and run.place.stage == "ppo":
        run.load(engine)
        done, course = run.place.step, Course(**run.state["course"])
        kl_control.coef = run.state["kl_coef"]
        if config.guard.action == "rollback" and not run.has(Place("ppo", course.good_step)):
            course.good_step = course.saved_step = done  # until now the run was to be stopped
    elif config.guard.action == "rollback":
        run.save(Place("ppo", 0), engine, state={"course": asdict(course), "kl_coef": kl_control.coef})
    # the policy has weights of its own where the trainer's are in shards, or change while it plays
    shares_model = rollout.policy == "hf" and rollout.lag == 0 and config.engine.zero_stage < 3
    sampled = lm
    if rollout.policy == "hf" and not shares_model:
        sampled = setup.language_model(tokenizer, run.path / "sft")
        torch.nn.Module.to(sampled, engine.device, lm.dtype)
    policy = setup.policy(sampled, tokenizer, run.path / "sft", temperature=rollout.temperature)
    streams = setup.train_streams
    count = min(ppo.streams_per_iteration, len(streams))

    def chosen(iteration: int) -> list[Stream]:
        rng = np.random.default_rng(derive_seed(config.seed, "streams", iteration))
        at_prices = priced(
            [streams[i] for i in sorted(rng.choice(len(streams), count, replace=False))],
            task.advice_price,
            first_price=task.first_price,
            drawn_from=task.training_prices,
            progress=iteration / max(1, ppo.num_iterations - 1),
            rng=rng,
        )
        return copies(at_prices, ppo.rollouts_per_stream)

    ended: list[Session] = []

    async def play(iteration: int) -> list[Trajectory]:
        all_streams = chosen(iteration)
        return await collect(
            executor,
            policy,
            [all_streams[i] for i in ranks.own_share(lengths(all_streams))],
            setup.memory,
            seed=derive_seed(config.seed, "ppo", iteration),
            max_failed=rollout.max_failed,
            max_concurrent=rollout.concurrency,
            on_session=ended.append,
        )

    engine_dtype = "float32" if rollout.policy == "hf" or config.vllm.dtype == "auto" else config.vllm.dtype
    exact = lm.dtype == torch.float32 and engine_dtype == "float32"
    collector = Collector(
        policy,
        play,
        (lambda: ()) if shares_model else engine.adapter_weights if config.swaps_adapters else engine.weights,
        copied=lambda weight: weight.detach().cpu().clone(),
        num_iterations=ppo.num_iterations,
        lag=rollout.lag,
        played=run.ahead() if done else {},
    )

    def collected(iteration: int) -> Sequence[Trajectory]:
        ended.clear()
        try:
            own = collector.collect(iteration)
        except AgileError:  # too many failed: what they say of it is in the log
            run.log_sessions(ended, stage="ppo", step=iteration + 1)
            raise
        run.log_sessions([s for t in own for s in t.sessions], stage="ppo", step=iteration + 1)
        return ranks.gather_shares(own, lengths(chosen(iteration)))

    with progress_bar() as progress, closing(policy), closing(collector):
        bar = progress.add_task("PPO", total=ppo.num_iterations, completed=done, note="")
        started = time.monotonic()

        def save(iteration: int) -> None:
            kept = [Place("ppo", i) for i in (course.good_step, course.saved_step, course.best_step) if i is not None]
            state = {"course": asdict(course), "kl_coef": kl_control.coef}
            run.save(Place("ppo", iteration), engine, collector.ahead(), state=state, keep=kept)

        def on_iteration(iteration: int, trajectories: Sequence[Trajectory], metrics: dict[str, float]) -> None:
            nonlocal started
            figures: dict[str, Any] = {
                **rates(outcomes(trajectories), [s.price for t in trajectories for s in t.sessions]),
                **{f"status/{status}": n for status, n in status_counts(trajectories).items()},
                "staleness": staleness(trajectories, iteration - 1),
                "skipped_steps": engine.num_skipped,
                **metrics,
            }
            if is_validated(config.validation.every, iteration, ppo.num_iterations):
                figures |= validate(setup, executor, policy, collector, iteration)
            figures["seconds"] = time.monotonic() - started
            started = time.monotonic()
            run.log("ppo", iteration, figures)
            advance(progress, bar, iteration, f"score {figures['score']:.3f}")
            if reason := trouble(config.guard, figures, course.best_score):
                run.log("guard", iteration, {"reason": reason, "action": config.guard.action, "to": course.good_step})
                course.respond(config.guard, iteration, reason)
                run.load(engine, Place("ppo", course.good_step))
                course.good_step = course.saved_step = iteration
                save(iteration)
                return
            course.good_step = course.saved_step
            # the policy stood still in the warm-up: a rollback goes back to a critic that is warm
            if iteration == 1 and config.guard.action == "rollback" and ppo.value_warmup_epochs:
                course.good_step = course.saved_step = iteration
            is_best = VALIDATION_SCORE in figures and course.validated(iteration, figures[VALIDATION_SCORE])
            if is_best or iteration % ppo.checkpoint_every == 0 or iteration == ppo.num_iterations:
                course.saved_step = iteration
            if course.saved_step == iteration or run.is_late():
                save(iteration)

        train_ppo(
            engine,
            reference,
            collect=collected,
            rewards=partial(terminal_rewards, config, setup.question_similarities()),
            on_iteration=on_iteration,
            first_iteration=done,
            num_iterations=ppo.num_iterations,
            value_warmup_epochs=ppo.value_warmup_epochs,
            discounts=discounts(ppo),
            coefficients=PPOCoefficients(
                clip=ppo.clip,
                value_clip=ppo.value_clip or math.inf,
                value_coef=ppo.value_coef,
                kl_coef=ppo.kl_coef,
                entropy_coef=ppo.entropy_coef,
                max_importance_weight=ppo.max_importance_weight,
            ),
            batch_size=ppo.batch_size,
            micro_batch_tokens=ppo.micro_batch_tokens,
            share_prefixes=ppo.share_prefixes,
            num_epochs=ppo.num_epochs,
            temperature=rollout.temperature,
            seed=config.seed,
            estimator=Estimator(ppo.estimator),
            kl_control=kl_control,
            max_epoch_kl=ppo.max_epoch_kl or math.inf,
            lr_factor=partial(lr_factor, ppo),
            masked=rollout.masked,
            check=partial(check_mismatch, rollout, exact=exact),
        )
    if config.validation.select_best and course.best_step is not None:
        run.load(engine, Place("ppo", course.best_step))
    run.export("ppo", Trained.gather(engine, str(run.path / "sft")), tokenizer)
    engine.close()
