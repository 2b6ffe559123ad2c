"""A run on disk: config, logs, checkpoints. Killing a run and resuming it gives the same run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

from agile.config import RunConfig
from agile.engine import Engine
from agile.errors import AgileError
from agile.session_log import JsonLines, append_sessions, read_lines
from agile.types import Session

KEPT_CHECKPOINTS = 2


@dataclass(frozen=True, slots=True)
class Place:
    """Where in its schedule a checkpoint was taken: `step` steps of `stage` are done."""

    stage: str
    step: int

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.step:06d}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a full disk, a read-only folder and the like into an error that a user can mend.

    Raises:
        AgileError: The operating system refused to write.
    """
    try:
        yield
    except OSError as error:
        raise AgileError(
            f"Cannot write to {path}: {error.strerror or error}. Free space or choose another folder with out=DIR; "
            "what was saved before stays valid, and --resume goes on from there."
        ) from error


class RunFolder:
    """Opens a new run folder, or an existing one to go on with.

    Args:
        path: The folder.
        config: Saved as config.yaml; on resume it must be the one the run was started with.
        resume: Go on from the last checkpoint. Without one the run starts anew.

    Raises:
        AgileError: The folder holds a run and `resume` is not set, or it was started with another config, or it cannot
            be written.
    """

    def __init__(self, path: Path, config: RunConfig, *, resume: bool):
        self.path = path
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        saved = path / "config.yaml"
        if saved.exists() and not resume:
            raise AgileError(f"{path} holds a run already. Go on with it by --resume, or choose another out=DIR.")
        if saved.exists() and saved.read_text() != text:
            changed = _differences(yaml.safe_load(saved.read_text()), config.model_dump(mode="json"))
            raise AgileError(
                f"{path} was started with another config; {'; '.join(changed) or 'its file differs'}. Resume it with "
                "the config it has, or choose another out=DIR."
            )
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            (path / "checkpoints").mkdir(exist_ok=True)
            for unfinished in (path / "checkpoints").glob(".*"):
                shutil.rmtree(unfinished)
            write_atomically(saved, text)
            self._sessions = JsonLines(path / "sessions-0.jsonl")
            self._metrics = JsonLines(path / "metrics.jsonl")
            state = self._rewind()
            self.place = None if state is None else Place(**state["place"])
            steps = state["tensorboard"] if state else 0
            self._tensorboard = SummaryWriter(str(path / "tensorboard"), purge_step=steps)
        self._tensorboard_steps = steps

    def _rewind(self) -> dict[str, Any] | None:
        """Cut the logs back to the last checkpoint; returns its state."""
        found = self._checkpoints()
        state = json.loads((found[-1] / "state.json").read_text()) if found else None
        sizes = state["sizes"] if state else {"sessions": 0, "metrics": 0}
        self._sessions.truncate(sizes["sessions"])
        self._metrics.truncate(sizes["metrics"])
        return state

    def _checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first (`ppo` follows `sft`)."""
        order = {"sft": 0, "ppo": 1}
        folders = [p.parent for p in (self.path / "checkpoints").glob("*/state.json")]
        return sorted(folders, key=lambda p: (order[p.name.split("-")[0]], p.name))

    # ---------------------------------------------------------------------------------------------------------------

    def log(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and the same numbers to TensorBoard."""
        with writing(self.path):
            self._metrics.append([{"stage": stage, "step": step, **metrics}])
            for name, value in metrics.items():
                if isinstance(value, int | float):
                    self._tensorboard.add_scalar(f"{stage}/{name}", value, step)
        self._tensorboard_steps = step

    def log_sessions(self, sessions: Sequence[Session], **tags: Any) -> None:
        with writing(self.path):
            append_sessions(self._sessions, sessions, **tags)

    def metrics(self) -> list[dict[str, Any]]:
        return list(read_lines(self.path / "metrics.jsonl"))

    def save(self, place: Place, engine: Engine) -> None:
        """Write a checkpoint: it is there whole or not at all. The last ones of the stage are kept."""
        folder = self.path / "checkpoints"
        draft = folder / f".{place.name}"
        with writing(self.path):
            engine.save(draft, "engine")
            state = {
                "place": asdict(place),
                "sizes": {"sessions": self._sessions.size, "metrics": self._metrics.size},
                "tensorboard": self._tensorboard_steps,
            }
            (draft / "state.json").write_text(json.dumps(state))
            shutil.rmtree(folder / place.name, ignore_errors=True)
            _sync_tree(draft)
            os.replace(draft, folder / place.name)
            for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)
        self.place = place

    def load(self, engine: Engine) -> None:
        """Restore the engine from the last checkpoint."""
        if self.place is not None:
            engine.load(self.path / "checkpoints" / self.place.name, "engine")

    def export(self, name: str, model: Any, tokenizer: Any) -> None:
        """Write an agent's weights and tokenizer as a Hugging Face folder `<run>/<name>`."""
        target, draft = self.path / name, self.path / f".{name}"
        with writing(self.path):
            shutil.rmtree(draft, ignore_errors=True)
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
            _sync_tree(draft)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(draft, target)

    def close(self) -> None:
        self._tensorboard.close()
        self._sessions.close()
        self._metrics.close()


def write_atomically(path: Path, text: str) -> None:
    """Replace a file whole or not at all."""
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old value, now new value` of every key that differs."""
    found = []
    for key in sorted({*old, *new}):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name} was {a!r}, is now {b!r}")
    return found
