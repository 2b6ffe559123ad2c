"""`agile train`: imitation, then PPO, in a run folder that can be killed and resumed at any moment."""

from __future__ import annotations

from pathlib import Path

import torch

from agile import ranks
from agile.build import Setup
from agile.config import RunConfig
from agile.errors import AgileError
from agile.run_folder import RunFolder
from agile.stages.ppo import reinforce
from agile.stages.sft import imitate


def check_processes(config: RunConfig, num: int) -> None:
    """Whether a run can use this many processes.

    Raises:
        AgileError: vLLM is to run inside them, or some of them would never have work.
    """
    if num > 1 and config.rollout.policy == "vllm":
        raise AgileError(
            f"rollout.policy is vllm, which runs in the training process and would join the {num} of this run. Start "
            "servers and set rollout.policy=vllm-server (docs/vllm.md)."
        )
    work = {"sft.batch_size": config.sft.batch_size}
    if config.ppo.num_iterations:
        work["ppo.batch_size"] = config.ppo.batch_size
        work["ppo.streams_per_iteration"] = config.ppo.streams_per_iteration
    for name, size in work.items():
        if size < num:
            raise AgileError(
                f"{name} is {size}, fewer than the {num} processes of this run: some would never have work. Start at "
                f"most {size}, or set {name}={num} or more."
            )


def train(config: RunConfig, out: Path, *, resume: bool = False) -> None:
    """Train by imitation and PPO; writes the agents `<out>/sft` and `<out>/ppo`.

    Raises:
        AgileError: Whatever a user can mend: data, config, run folder, disk.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    check_processes(config, ranks.world_size())
    run = RunFolder(out, config, resume=resume)
    setup = Setup(config, out)
    with ranks.main_first():
        setup.embed([*setup.train_streams, *setup.validation_streams])
    # also on resume: what a save and a load add to its files is no part of the run
    tokenizer = ranks.broadcast(setup.tokenizer())
    executor = setup.executor(tokenizer, counterfactual=config.ppo.credit == "lineage")
    if run.place is None or run.place.stage == "sft":
        imitate(config, run, setup, executor)
    if config.ppo.num_iterations:
        reinforce(config, run, setup, executor)
    run.close()
