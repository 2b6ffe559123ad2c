"""`agile train`: imitation, PPO, preferences, in a run folder that can be killed and resumed at any moment."""

from __future__ import annotations

from pathlib import Path

import torch

from agile import ranks
from agile.build import Setup
from agile.config import RunConfig
from agile.errors import AgileError
from agile.run_folder import RunFolder
from agile.stages.ppo import Watch, reinforce
from agile.stages.preference import train_on_preferences
from agile.stages.sft import imitate


def check_processes(config: RunConfig, num: int) -> None:
    """Whether a run can use this many processes.

    Raises:
        AgileError: vLLM or TRL is to run inside them, or some of them would never have work.
    """
    if num > 1 and config.rollout.policy == "vllm":
        raise AgileError(
            f"rollout.policy is vllm, which runs in the training process and would join the {num} of this run. Start "
            "servers and set rollout.policy=vllm-server (docs/vllm.md)."
        )
    if num > 1 and (one := [stage for stage in config.stages if stage in ("dpo", "reward-model")]):
        raise AgileError(
            f"stages has {', '.join(one)}, which run in one process, but a launcher started {num}. Leave them out, "
            f"and run them afterwards without a launcher: agile preferences RUN, then stages=[{one[0]}] "
            "model.path=RUN/ppo preferences.data=RUN/preferences.jsonl."
        )
    work = {"sft.batch_size": config.sft.batch_size}
    if config.plays:
        work["ppo.batch_size"] = config.ppo.batch_size
        if config.ppo.rollouts_per_stream == 1:
            work["ppo.streams_per_iteration"] = config.ppo.streams_per_iteration
    for name, size in work.items():
        if size < num:
            raise AgileError(
                f"{name} is {size}, fewer than the {num} processes of this run: some would never have work. Start at "
                f"most {size}, or set {name}={num} or more."
            )


def check_streams(num_train: int, num_validation: int, num: int) -> None:
    """Whether so many processes have streams to play.

    Raises:
        AgileError: Some would have none.
    """
    if num_train < num:
        raise AgileError(
            f"The task has {num_train} train streams to learn from, fewer than the {num} processes of this run: some "
            f"would never have work. Start at most {num_train}, take more train groups or worlds, or set fewer aside "
            f"for validation ({num_validation} are)."
        )


def train(
    config: RunConfig, out: Path, *, resume: bool = False, watch: Watch = lambda iteration, figures: None
) -> None:
    """Run the stages of a config; writes the agents `<out>/sft`, `<out>/ppo` and `<out>/dpo`, and `<out>/reward-model`.

    Args:
        watch: Called with the figures of each iteration of PPO.

    Raises:
        AgileError: Whatever a user can mend: data, config, run folder, disk.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    ranks.join()
    check_processes(config, ranks.world_size())
    with RunFolder(out, config, resume=resume) as run:
        setup = Setup(config, out)
        with ranks.main_first():
            check_streams(len(setup.train_streams), len(setup.validation_streams), ranks.world_size())
            setup.embed([*setup.train_streams, *setup.validation_streams])
        # also on resume: what a save and a load add to its files is no part of the run
        tokenizer = ranks.broadcast(setup.tokenizer())
        executor = setup.executor(tokenizer, counterfactual=config.ppo.credit == "lineage")
        if "sft" in config.stages and (run.place is None or run.place.stage == "sft"):
            imitate(config, run, setup, executor)
        if config.plays:
            reinforce(config, run, setup, executor, watch)
        train_on_preferences(config, run, setup)
