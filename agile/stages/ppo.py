"""The stage `ppo`: the policy plays the train streams and learns from what came of it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from agile.build import Setup
from agile.config import PPOConfig, RolloutConfig, RunConfig, UpdateConfig
from agile.credit import Estimator
from agile.engine import Engine
from agile.errors import AgileError
from agile.evaluate import grading_errors, outcomes, rates
from agile.executor import Executor
from agile.export import Trained
from agile.lag import Collector, staleness
from agile.losses import PPOCoefficients
from agile.model import ActorCritic
from agile.protocols import TrainablePolicy
from agile.reference import Reference, adapter_free, frozen
from agile.rollout import status_counts, warn_of_failures
from agile.run_folder import Place, RunFolder
from agile.stages.collection import Collection
from agile.stages.guard import VALIDATION_SCORE, Course, Finished, trouble
from agile.stages.progress import advance, progress_bar
from agile.stages.rewards import discounts, terminal_rewards
from agile.stages.validation import is_validated, validate
from agile.train.kl import KLControl
from agile.train.ppo import train_ppo
from agile.types import Trajectory

logger = logging.getLogger(__name__)

Watch = Callable[[int, Mapping[str, Any]], None]  # number of an iteration (0: before the first), figures

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
    if exact and rollout.lag == 0 and not difference <= rollout.max_difference:  # so compared that NaN is too much
        raise AgileError(
            f"Iteration {iteration + 1}: the logprobs of rollout.policy={rollout.policy} and of the trainer differ by "
            f"up to {difference:.3g} nats, expected at most {rollout.max_difference:g} (rollout.max_difference). The "
            "engine has other weights, or samples from a truncated or otherwise changed distribution. Nothing was "
            "learned from it: start the engine or its servers anew and go on with --resume."
        )
    ratio, outside = mismatch["rollout_ratio"], mismatch["rollout_outside"]
    if not abs(ratio - 1) <= HEALTHY_RATIO or outside > HEALTHY_OUTSIDE:
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


def coefficients(ppo: UpdateConfig) -> PPOCoefficients:
    """Those of the loss."""
    return PPOCoefficients(
        clip=ppo.clip,
        value_clip=ppo.value_clip or math.inf,
        value_coef=ppo.value_coef,
        kl_coef=ppo.kl_coef,
        entropy_coef=ppo.entropy_coef,
        max_importance_weight=ppo.max_importance_weight,
    )


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


def reference_policy(
    config: RunConfig, setup: Setup, engine: Engine, tokenizer: PreTrainedTokenizerFast, start: Path
) -> Reference | None:
    """What KL is taken to: the agent in the folder `start`, frozen; None if KL has no weight."""
    if not config.ppo.kl_coef:
        return None
    if config.lora:
        return adapter_free(engine)
    agent = ActorCritic(setup.language_model(tokenizer, start))
    return frozen(agent, engine, offload=config.ppo.reference == "offload")


def restore(config: RunConfig, run: RunFolder, engine: Engine, kl_control: KLControl) -> tuple[int, Course]:
    """Take up PPO where the run stands; returns how many iterations are done, and how they went."""
    guard = config.guard
    if run.place and run.place.stage == "ppo":
        run.load(engine)
        done, course = run.place.step, Course(**run.state["course"])
        kl_control.coef = run.state["kl_coef"]
        if guard.action == "rollback" and not run.has(Place("ppo", course.good_step)):
            course.good_step = course.saved_step = done  # until now the run was to be stopped
        return done, course
    course = Course()
    if guard.action == "rollback":
        run.save(Place("ppo", 0), engine, state={"course": asdict(course), "kl_coef": kl_control.coef})
    return 0, course


@dataclass
class Aftermath:
    """What follows an iteration: its figures are logged and validated, the guard looks at them, and it is saved."""

    run: RunFolder
    setup: Setup
    engine: Engine
    executor: Executor
    policy: TrainablePolicy
    collector: Collector
    course: Course
    kl_control: KLControl
    show: Callable[[int, str], None]
    watch: Watch
    started: float = field(default_factory=time.monotonic)

    def save(self, iteration: int) -> None:
        course = self.course
        kept = [Place("ppo", i) for i in (course.good_step, course.saved_step, course.best_step) if i is not None]
        state = {"course": asdict(course), "kl_coef": self.kl_control.coef}
        self.run.save(Place("ppo", iteration), self.engine, self.collector.ahead(), state=state, keep=kept)

    def before_the_first(self) -> None:
        """Validate what PPO starts from: it may stay the best."""
        figures = validate(self.setup, self.executor, self.policy, self.collector, 0)
        self.course.validated(0, figures[VALIDATION_SCORE])
        self.run.log("ppo", 0, figures)
        self.watch(0, figures)
        self.save(0)

    def __call__(self, iteration: int, trajectories: Sequence[Trajectory], metrics: dict[str, float]) -> None:
        config, course = self.setup.config, self.course
        ppo, guard = config.ppo, config.guard
        warn_of_failures(f"Iteration {iteration}", trajectories)
        figures: dict[str, Any] = {
            **rates(outcomes(trajectories), [s.price for t in trajectories for s in t.sessions]),
            **{f"status/{status}": n for status, n in status_counts(trajectories).items()},
            "staleness": staleness(trajectories, iteration - 1),
            "skipped_steps": self.engine.num_skipped,
            **{f"grading/{name}": n for name, n in grading_errors(trajectories).items()},
            **metrics,
        }
        if is_validated(config.validation.every, iteration, ppo.num_iterations):
            figures |= validate(self.setup, self.executor, self.policy, self.collector, iteration)
        now = time.monotonic()
        figures["seconds"], self.started = now - self.started, now
        self.run.log("ppo", iteration, figures)
        self.show(iteration, f"score {figures['score']:.3f}")
        self.watch(iteration, figures)
        if reason := trouble(guard, figures, course.best_score):
            self.run.log("guard", iteration, {"reason": reason, "action": guard.action, "to": course.good_step})
            course.respond(guard, iteration, reason)
            num_skipped = self.engine.num_skipped
            self.run.load(self.engine, Place("ppo", course.good_step))
            self.engine.num_skipped = num_skipped  # what was skipped stays counted
            course.good_step = course.saved_step = iteration
            self.save(iteration)
            return
        course.good_step = course.saved_step
        # the policy stood still in the warm-up: a rollback goes back to a critic that is warm
        if iteration == 1 and guard.action == "rollback" and ppo.value_warmup_epochs:
            course.good_step = course.saved_step = iteration
        is_best = VALIDATION_SCORE in figures and course.validated(iteration, figures[VALIDATION_SCORE])
        if is_best or iteration % ppo.checkpoint_every == 0 or iteration == ppo.num_iterations:
            course.saved_step = iteration
        if course.saved_step == iteration or self.run.is_late():
            self.save(iteration)


def reinforce(
    config: RunConfig,
    run: RunFolder,
    setup: Setup,
    executor: Executor,
    watch: Watch = lambda iteration, figures: None,
) -> None:
    """Train the agent `sft` and a critic on its own sessions, from where the run stands; writes the agent `ppo`."""
    ppo, rollout, start = config.ppo, config.rollout, run.path / "sft"
    kl_control = KLControl(ppo.kl_coef, ppo.kl_target)
    tokenizer = executor.codec.tokenizer
    torch.manual_seed(config.seed)
    engine = ppo_engine(config, setup, tokenizer, start)
    reference = reference_policy(config, setup, engine, tokenizer, start)
    done, course = restore(config, run, engine, kl_control)
    # the policy has weights of its own where the trainer's are in shards, or change while it plays
    shares_model = rollout.policy == "hf" and rollout.lag == 0 and config.engine.zero_stage < 3
    sampled = lm = engine.module.lm
    weights = engine.adapter_weights if config.swaps_adapters else engine.weights
    if rollout.policy == "hf" and not shares_model:
        sampled = setup.language_model(tokenizer, start)
        torch.nn.Module.to(sampled, engine.device, lm.dtype)
    policy = setup.policy(sampled, tokenizer, start, temperature=rollout.temperature)
    engine_dtype = "float32" if rollout.policy == "hf" or config.vllm.dtype == "auto" else config.vllm.dtype
    exact = lm.dtype == torch.float32 and engine_dtype == "float32"
    collection = Collection(run, setup, executor, policy, (lambda: ()) if shares_model else weights, resumed=done > 0)
    with progress_bar() as progress, closing(policy), closing(collection), suppress(Finished):
        bar = progress.add_task("PPO", total=ppo.num_iterations, completed=done, note="")
        show = partial(advance, progress, bar)
        follow = Aftermath(run, setup, engine, executor, policy, collection.collector, course, kl_control, show, watch)
        if config.validation.start and not (done or course.best_step == 0):
            follow.before_the_first()
        train_ppo(
            engine,
            reference,
            collect=collection.collect,
            rewards=partial(terminal_rewards, config, setup.question_similarities()),
            on_iteration=follow,
            first_iteration=done,
            num_iterations=ppo.num_iterations,
            value_warmup_epochs=ppo.value_warmup_epochs,
            discounts=discounts(ppo),
            coefficients=coefficients(ppo),
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
    run.export("ppo", Trained.gather(engine, str(start)), tokenizer)
    engine.close()
