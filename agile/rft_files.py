"""What `agile rft` is told: files, the hosted API's hyper-parameters, and the config that they come to.

Imports nothing heavy, so that files are checked in a moment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agile.config import RunConfig, load_config
from agile.errors import AgileError
from agile.tasks.rft import RftTask
from agile.tasks.rft_rows import read_rows

CONFIG = Path(__file__).parent / "configs" / "rft.yaml"
HYPERPARAMETERS = (
    "n_epochs", "batch_size", "learning_rate_multiplier", "compute_multiplier", "eval_interval", "eval_samples",
)  # fmt: skip
AUTO_EPOCHS, AUTO_BATCH, AUTO_SAMPLES = 20, 64, 8
SMALL_LR, LARGE_LR = 3e-4, 1e-6  # of models up to so many hidden dimensions, and of larger ones
SMALL_HIDDEN = 512


@dataclass(frozen=True, slots=True)
class Files:
    """What a run is made of.

    Attributes:
        model: Hugging Face folder or name; None for the small model from scratch.
        imitate: Rows to imitate first.
    """

    train: Path
    validation: Path
    grader: str
    model: str | None = None
    imitate: Path | None = None
    response_format: Path | None = None


def hyperparameters(words: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """The hosted API's hyper-parameters among the words of a command line, those that are not "auto", and the rest.

    Raises:
        AgileError: One is no number above 0, or a whole number was expected.
    """
    found: dict[str, float] = {}
    rest = []
    for word in words:
        name, _, text = word.partition("=")
        if name not in HYPERPARAMETERS:
            rest.append(word)
            continue
        if text == "auto":
            continue
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        whole = not name.endswith("multiplier")
        if not 0 < number < math.inf or (whole and number != int(number)):
            what = "a whole number from 1" if whole else "a number above 0"
            raise AgileError(f'{word!r}: expected {what}, or "auto".')
        found[name] = number
    return found, rest


def settings(
    files: Files, given: Mapping[str, float], num_train: int, num_validation: int, *, estimator: str = "group"
) -> list[str]:
    """The words of a config that files and hyper-parameters come to, before the user's own."""
    batch = min(int(given.get("batch_size", AUTO_BATCH)), num_train)
    per_epoch = math.ceil(num_train / batch)
    epochs = int(given.get("n_epochs", AUTO_EPOCHS))
    samples = max(2, round(AUTO_SAMPLES * given.get("compute_multiplier", 1.0)))
    lr = (SMALL_LR if _is_small(files.model) else LARGE_LR) * given.get("learning_rate_multiplier", 1.0)
    paths = {
        "task.data": files.train,
        "task.validation_data": files.validation,
        "task.grader": files.grader,
        "task.imitation_data": files.imitate,
        "task.response_format": files.response_format,
        "model.path": files.model,
    }
    words = [f"{key}={json.dumps(str(path))}" for key, path in paths.items() if path is not None]
    words += [
        f"ppo.num_iterations={epochs * per_epoch}",
        f"ppo.streams_per_iteration={batch}",
        f"ppo.rollouts_per_stream={samples}",
        f"ppo.lr={lr!r}",
        f"validation.every={int(given.get('eval_interval', per_epoch))}",
        f"validation.num_streams={min(int(given.get('eval_samples', num_validation)), num_validation)}",
    ]
    if files.imitate is not None:
        words.append("sft.num_steps=1000")
    if estimator == "gae":  # the other estimators have no critic
        words += ["ppo.value_coef=0.5", "ppo.value_warmup_epochs=4"]
    return words


def _is_small(model: str | None) -> bool:
    if model is None:
        return True
    try:
        saved = json.loads((Path(model).expanduser() / "config.json").read_text(encoding="utf-8"))
        return int(saved.get("hidden_size", math.inf)) <= SMALL_HIDDEN
    except (OSError, ValueError, OverflowError):
        return False


def rft_config(files: Files, words: Sequence[str]) -> RunConfig:
    """The config of a run, every file of it read and checked.

    Raises:
        AgileError: A line for each thing that is wrong with the files, or with the words.
    """
    given, rest = hyperparameters(words)
    problems: list[str] = []
    num_rows = [len(read_rows(path, "user", problems)) for path in (files.train, files.validation)]
    estimator = next((w.partition("=")[2] for w in reversed(rest) if w.startswith("ppo.estimator=")), "group")
    longest = [w.replace("context", "session") for w in rest if w.startswith("rollout.max_context_tokens=")]
    words = settings(files, given, *(max(1, n) for n in num_rows), estimator=estimator)
    config = load_config(CONFIG, [*words, *longest, *rest])
    task = config.task
    rows = RftTask(
        files.train,
        files.validation,
        Path(files.grader),
        imitation_data=files.imitate,
        response_format=files.response_format,
        max_items=task.max_items,
    )
    rows.streams("train")  # reads and checks all files, and raises all problems
    return config
