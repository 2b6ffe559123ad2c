"""The stage `sft`: imitation of a teacher."""

from __future__ import annotations

import torch

from agile.batching import Row
from agile.build import Setup
from agile.config import RunConfig
from agile.engine import Engine
from agile.errors import AgileError
from agile.executor import Executor
from agile.export import Trained
from agile.model import ActorCritic
from agile.run_folder import Place, RunFolder
from agile.sft_data import read_rows
from agile.stages.progress import advance, progress_bar
from agile.train.sft import sft_schedule, train_sft


def _rows(config: RunConfig, setup: Setup, executor: Executor) -> list[Row]:
    """Sessions of `sft.data`, or of the teacher."""
    if config.sft.data is None:
        rows = setup.imitation_rows(executor)
    else:
        rows = read_rows(config.sft.data, config, setup.train_streams, executor.codec.tokenizer)
    if not rows:
        raise AgileError(
            "No imitation session was completed; most likely none fits the limits. Raise "
            f"rollout.max_context_tokens ({config.rollout.max_context_tokens}) or rollout.max_action_tokens "
            f"({config.rollout.max_action_tokens}), or lower agent.product_k, group_k, knowledge_k."
        )
    return rows


def imitate(config: RunConfig, run: RunFolder, setup: Setup, executor: Executor) -> None:
    """Train the configured model on a teacher's sessions, from where the run stands; writes the agent `sft`."""
    sft = config.sft
    tokenizer = executor.codec.tokenizer
    torch.manual_seed(config.seed)
    model = ActorCritic(setup.trained_model(tokenizer))
    engine = Engine(
        model,
        **config.engine.model_dump(),
        lr=sft.lr,
        groups=[{"params": [p for p in model.lm.parameters() if p.requires_grad]}],
        weight_decay=sft.weight_decay,
        max_grad_norm=sft.max_grad_norm,
        skip_above=config.guard.max_grad_norm,
        max_skipped=config.guard.max_skipped_steps,
        schedule=sft_schedule(sft.num_steps, sft.warmup_steps),
    )
    run.load(engine)
    done = run.place.step if run.place else 0
    rows = _rows(config, setup, executor) if done < sft.num_steps else []
    with progress_bar() as progress:
        bar = progress.add_task("imitation", total=sft.num_steps, completed=done, note="")

        def on_step(step: int, loss: float) -> None:
            run.log("sft", step, {"loss": loss, "lr": engine.lr, "skipped_steps": engine.num_skipped})
            advance(progress, bar, step, f"loss {loss:.3f}")
            if step % sft.checkpoint_every == 0 or step == sft.num_steps or run.is_late():
                run.save(Place("sft", step), engine)

        train_sft(
            engine,
            rows,
            batch_size=sft.batch_size,
            micro_batch_tokens=sft.micro_batch_tokens,
            share_prefixes=sft.share_prefixes,
            num_steps=sft.num_steps,
            seed=config.seed,
            first_step=done,
            on_step=on_step,
        )
    run.export("sft", Trained.gather(engine, config.model.path or ""), tokenizer)
    engine.close()
