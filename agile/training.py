"""`agile train`: imitation, PPO, preferences, in a run folder that can be killed and resumed at any moment."""

from __future__ import annotations

from pathlib import Path

import torch

from agile.build import Setup
from agile.config import RunConfig
from agile.run_folder import RunFolder
from agile.stages.ppo import reinforce
from agile.stages.preference import train_on_preferences
from agile.stages.sft import imitate


def train(config: RunConfig, out: Path, *, resume: bool = False) -> None:
    """Run the stages of a config; writes the agents `<out>/sft`, `<out>/ppo` and `<out>/dpo`, and `<out>/reward-model`.

    Raises:
        AgileError: Whatever a user can mend: data, config, run folder, disk.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run = RunFolder(out, config, resume=resume)
    setup = Setup(config, out)
    setup.embed([*setup.train_streams, *setup.validation_streams])
    tokenizer = setup.tokenizer()  # also on resume: what a save and a load add to its files is no part of the run
    executor = setup.executor(tokenizer, counterfactual=config.ppo.credit == "lineage")
    if "sft" in config.stages and (run.place is None or run.place.stage == "sft"):
        imitate(config, run, setup, executor)
    if "ppo" in config.stages and config.ppo.num_iterations:
        reinforce(config, run, setup, executor)
    train_on_preferences(config, run, setup)
    run.close()
