"""`agile train`: imitation, then PPO, in a run folder that can be killed and resumed at any moment."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agile.build import Setup
from agile.config import RunConfig
from agile.credit import Credit, session_rewards
from agile.engine import Engine
from agile.evaluate import outcomes, rates
from agile.executor import Executor
from agile.losses import PPOCoefficients
from agile.model import ActorCritic
from agile.policies import HFPolicy
from agile.rollout import collect
from agile.run_folder import Place, RunFolder
from agile.seeding import derive_seed
from agile.train.ppo import Discounts, train_ppo
from agile.train.sft import sft_schedule, train_sft
from agile.types import Trajectory


def train(config: RunConfig, out: Path, *, resume: bool = False) -> None:
    """Train by imitation and PPO; writes the agents `<out>/sft` and `<out>/ppo`.

    Raises:
        AgileError: Whatever a user can mend: data, config, run folder, disk.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run = RunFolder(out, config, resume=resume)
    setup = Setup(config, out)
    setup.embed(setup.task.streams("train"))
    tokenizer = setup.tokenizer(out / "sft" if (out / "sft").exists() else None)
    executor = setup.executor(tokenizer)
    torch.manual_seed(config.seed)
    imitated = run.place is not None and run.place.stage == "ppo"
    model = ActorCritic(setup.language_model(tokenizer, out / "sft" if imitated else None))
    if not imitated:
        _imitate(config, run, setup, executor, model)
        run.export("sft", model.lm, tokenizer)
    if config.ppo.num_iterations:
        _reinforce(config, run, setup, executor, model)
        run.export("ppo", model.lm, tokenizer)
    run.close()


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )


def _imitate(config: RunConfig, run: RunFolder, setup: Setup, executor: Executor, model: ActorCritic) -> None:
    sft = config.sft
    engine = Engine(
        model,
        lr=sft.lr,
        groups=[{"params": list(model.lm.parameters())}],
        weight_decay=sft.weight_decay,
        max_grad_norm=sft.max_grad_norm,
        schedule=sft_schedule(sft.num_steps, sft.warmup_steps),
    )
    run.load(engine)
    done = run.place.step if run.place else 0
    rows = setup.imitation_rows(executor) if done < sft.num_steps else []
    with _progress() as progress:
        bar = progress.add_task("imitation", total=sft.num_steps, completed=done, note="")

        def on_step(step: int, loss: float) -> None:
            run.log("sft", step, {"loss": loss, "lr": engine.lr})
            progress.update(bar, completed=step, note=f"loss {loss:.3f}")
            if step % sft.checkpoint_every == 0 or step == sft.num_steps:
                run.save(Place("sft", step), engine)

        train_sft(
            engine,
            rows,
            batch_size=sft.batch_size,
            micro_batch_size=sft.micro_batch_size,
            num_steps=sft.num_steps,
            seed=config.seed,
            first_step=done,
            on_step=on_step,
        )
    engine.close()


def terminal_rewards(
    config: RunConfig,
    similarities: Callable[[str], NDArray[np.float32]],
    trajectories: Sequence[Trajectory],
    rng: np.random.Generator,
) -> list[list[float]]:
    """What each session of each trajectory is worth: the task's reward and the credit term of `config.ppo`.

    Args:
        similarities: The cosine of every pair of a stream's questions, (n, n), by the stream's id.
        rng: Shuffles the task's rewards where the config asks for that control.
    """
    ppo = config.ppo
    totals = [[s.reward.total if s.reward else 0.0 for s in t.sessions] for t in trajectories]
    if config.demo.shuffle_rewards:
        flat = rng.permutation([r for row in totals for r in row]).tolist()
        totals = [[flat.pop() for _ in row] for row in totals]
    return [
        session_rewards(
            row,
            Credit(ppo.credit),
            similarities=similarities(t.stream_id) if ppo.credit == "utility" else None,
            advised=[s.advised for s in t.sessions],
            beta=ppo.utility_beta,
            threshold=ppo.utility_similarity,
        ).tolist()
        for t, row in zip(trajectories, totals, strict=True)
    ]


def _reinforce(config: RunConfig, run: RunFolder, setup: Setup, executor: Executor, model: ActorCritic) -> None:
    ppo, rollout = config.ppo, config.rollout
    reference = ActorCritic(copy.deepcopy(model.lm)).requires_grad_(False) if ppo.kl_coef else None
    engine = Engine(
        model,
        lr=ppo.lr,
        groups=model.parameter_groups(ppo.value_lr),
        weight_decay=ppo.weight_decay,
        max_grad_norm=ppo.max_grad_norm,
    )
    if reference is not None:
        reference.to(engine.device)
    done = 0
    if run.place and run.place.stage == "ppo":
        run.load(engine)
        done = run.place.step
    policy = HFPolicy(
        model.lm,
        executor.codec.tokenizer.pad_token_id,
        temperature=rollout.temperature,
        max_batch_size=rollout.max_batch_size,
    )
    streams = setup.task.streams("train")
    count = min(ppo.streams_per_iteration, len(streams))
    started = time.monotonic()

    def play(iteration: int) -> list[Trajectory]:
        nonlocal started
        started = time.monotonic()
        policy.update_weights((), iteration)  # the trainer changed the model in place
        rng = np.random.default_rng(derive_seed(config.seed, "streams", iteration))
        chosen = [streams[i] for i in sorted(rng.choice(len(streams), count, replace=False))]
        trajectories = asyncio.run(
            collect(
                executor,
                policy,
                chosen,
                setup.memory,
                seed=derive_seed(config.seed, "ppo", iteration),
                max_failed=rollout.max_failed,
            )
        )
        run.log_sessions([s for t in trajectories for s in t.sessions], stage="ppo", step=iteration + 1)
        return trajectories

    with _progress() as progress:
        bar = progress.add_task("PPO", total=ppo.num_iterations, completed=done, note="")

        def on_iteration(iteration: int, trajectories: Sequence[Trajectory], metrics: dict[str, float]) -> None:
            results = outcomes(trajectories)
            figures: dict[str, Any] = {
                **rates(results, config.task.advice_price),
                "failed": sum(o.failed for o in results),
                "seconds": time.monotonic() - started,
                **metrics,
            }
            run.log("ppo", iteration, figures)
            progress.update(bar, completed=iteration, note=f"score {figures['score']:.3f}")
            if iteration % ppo.checkpoint_every == 0 or iteration == ppo.num_iterations:
                run.save(Place("ppo", iteration), engine)

        train_ppo(
            engine,
            reference,
            collect=play,
            rewards=partial(terminal_rewards, config, setup.question_similarities()),
            on_iteration=on_iteration,
            first_iteration=done,
            num_iterations=ppo.num_iterations,
            value_warmup_epochs=ppo.value_warmup_epochs,
            discounts=Discounts(ppo.gamma, ppo.lam, ppo.gamma_session, ppo.lam_session),
            coefficients=PPOCoefficients(
                clip=ppo.clip,
                value_clip=ppo.value_clip,
                value_coef=ppo.value_coef,
                kl_coef=ppo.kl_coef,
                entropy_coef=ppo.entropy_coef,
                max_importance_weight=ppo.max_importance_weight,
            ),
            batch_size=ppo.batch_size,
            micro_batch_size=ppo.micro_batch_size,
            num_epochs=ppo.num_epochs,
            temperature=rollout.temperature,
            seed=config.seed,
        )
