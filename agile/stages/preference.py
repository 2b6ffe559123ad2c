"""The stages `dpo` and `reward-model`: what a run is told, handed to TRL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.progress import TaskID

from agile.build import Setup
from agile.config import PreferenceStageConfig, RunConfig
from agile.errors import AgileError
from agile.preferences import run_preferences
from agile.run_folder import RunFolder
from agile.session_log import read_lines
from agile.stages.progress import advance, progress_bar
from agile.train.preference import Pair, Schedule, import_trl, split_pairs, train_dpo, train_reward_model

STAGES = ("dpo", "reward-model")


def train_on_preferences(config: RunConfig, run: RunFolder, setup: Setup) -> None:
    """Run the stages of TRL's that the config names; each starts from what `ppo` or `sft` trained last.

    Neither has checkpoints: a run that was killed in one starts that stage anew.

    Raises:
        AgileError: TRL is not installed, or there are no pairs.
    """
    stages = [stage for stage in config.stages if stage in STAGES]
    if not stages:
        return
    import_trl()
    pairs = read_pairs(config.preferences.data) if config.preferences.data else _own_pairs(config, run)
    kept, held_out = split_pairs(pairs, config.preferences.held_out, config.seed)
    folder = _last_agent(config, run)
    tokenizer = setup.tokenizer(folder)
    for stage in stages:
        section: PreferenceStageConfig = config.dpo if stage == "dpo" else config.reward_model
        names = ("lr", "batch_size", "micro_batch_size", "num_epochs", "warmup_steps", "weight_decay", "max_grad_norm")
        schedule = Schedule(
            **{name: getattr(section, name) for name in names},
            gradient_checkpointing=config.engine.gradient_checkpointing,
        )
        total = section.num_epochs * -(-len(kept) // section.batch_size)
        with progress_bar() as progress:
            bar: TaskID = progress.add_task(stage, total=total, note="")

            def on_log(step: int, figures: Mapping[str, float], stage: str = stage, bar: TaskID = bar) -> None:
                run.log(stage, step, figures)
                advance(progress, bar, step, f"loss {figures['loss']:.3f}" if "loss" in figures else "")

            if stage == "dpo":
                lm = setup.language_model(tokenizer, folder)
                model = train_dpo(
                    lm,
                    tokenizer,
                    kept,
                    held_out,
                    beta=config.dpo.beta,
                    schedule=schedule,
                    seed=config.seed,
                    on_log=on_log,
                )
            else:
                model = train_reward_model(
                    folder, tokenizer, kept, held_out, schedule=schedule, seed=config.seed, on_log=on_log
                )
        run.export(stage, model, tokenizer)


def read_pairs(path: Path) -> list[Pair]:
    """Pairs from a file in TRL's explicit-prompt preference format, plain text.

    Raises:
        AgileError: A line is something else.
    """
    pairs: list[Pair] = []
    for number, line in enumerate(read_lines(path), 1):
        found = line if isinstance(line, dict) else {}
        texts = {name: found[name] for name in ("prompt", "chosen", "rejected") if isinstance(found.get(name), str)}
        if len(texts) < 3:
            raise AgileError(
                f"{path}, line {number}: expected an object whose prompt, chosen and rejected are texts, as "
                "`agile preferences RUN` writes them."
            )
        pairs.append(texts)
    return pairs


def _own_pairs(config: RunConfig, run: RunFolder) -> list[Pair]:
    found, _ = run_preferences(run.path, gold=config.preferences.gold)
    return [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in found]


def _last_agent(config: RunConfig, run: RunFolder) -> Path:
    """The folder of the agent that the run trained last, or the model that it was given."""
    trained = [run.path / name for name in ("ppo", "sft") if name in config.stages and (run.path / name).exists()]
    assert trained or config.model.path is not None, "the config was checked"
    return trained[0] if trained else Path(str(config.model.path))
