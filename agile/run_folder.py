"""A run on disk: config, logs, checkpoints. Killing a run and resuming it gives the same run."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from agile import ranks
from agile.config import TrainingConfig, differences, flat, load_section
from agile.engine import REMOVE, Engine
from agile.errors import AgileError
from agile.session_log import JsonLines, append_sessions, read_lines, session_from_json
from agile.tracking import Tracking, check_installed
from agile.types import Session, Trajectory

logger = logging.getLogger(__name__)

# What may change while a run is interrupted: where engines are, how patient it is, what it keeps and what stops it; no
# token depends on it.
FREE_KEYS = (
    *("tracking.", "checkpoints.", "guard."),
    *(f"vllm.{name} " for name in ("servers", "weights_dir", "timeout_s", "kv_cache_gib", "gpu_memory_utilization")),
    "engine.gradient_checkpointing ",
    *("rollout.max_failed ", "rollout.max_stage_s "),
    *(
        f"{section}.{name} "
        for section in ("evaluate.prompted", "sft.teacher", "sft.judge", "task.judge", "task.grading")
        for name in ("api_key_env", "max_concurrent", "requests_per_minute", "timeout_s")
    ),
)


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
            "what was saved before stays valid, and training goes on from there by --resume."
        ) from error


def claim(path: Path, config: TrainingConfig) -> IO[str]:
    """Make a folder the one of this config: it is new, or empty, or was started with the same config.

    Returns:
        A lock that keeps other processes out until it is closed or the process ends, however it ends.

    Raises:
        AgileError: The folder holds something else or a run with another config, another process works in it, or it
            cannot be written.
    """
    saved = path / "config.yaml"
    known, started = saved.exists(), _started(path)
    changes = differences(load_section(type(config), saved), config) if known and started else []
    if changed := [c for c in changes if not c.startswith(FREE_KEYS)]:
        raise AgileError(
            f"{path} was started with another config: {'; '.join(changed)}. "
            f"Go on with the one it has, {saved}, or choose another out=DIR."
        )
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        if not known and (found := sorted(p.name for p in path.iterdir() if not p.name.startswith("."))):
            raise AgileError(
                f"{path} is not empty ({', '.join(found[:3])}{', ...' * (len(found) > 3)}) and no run of AGILE: it has "
                "no config.yaml. Choose another out=DIR, so that nothing in it is overwritten."
            )
        lock = (path / ".lock").open("w")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise AgileError(f"Another process works in {path}. Wait for it, or choose another out=DIR.") from None
        if changes or not (known and started):
            if not started:  # worlds of a start that failed, whose config may have been another
                shutil.rmtree(path / "minishop", ignore_errors=True)
            write_atomically(saved, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return lock


def _started(path: Path) -> bool:
    """Whether a run has left anything to keep; one that failed at once leaves what is made anew, and empty files."""
    made_anew = ("config.yaml", "embeddings.", "answers.", "minishop", ".minishop-")
    files = (f for f in path.rglob("*") if not any(p.startswith(made_anew) for p in f.relative_to(path).parts))
    return any(f.is_file() and f.stat().st_size for f in files)


@dataclass(frozen=True, slots=True)
class _Main:
    """What the main process alone has open."""

    lock: IO[str]
    metrics: JsonLines
    tracking: Tracking


class RunFolder:
    """Opens a new run folder, or an existing one to go on with.

    Args:
        path: The folder.
        config: Saved as config.yaml; on resume it must be the one the run was started with.
        resume: Go on from the last checkpoint. Without one the run starts anew.

    Raises:
        AgileError: The folder holds a run and `resume` is not set, or it was started with another config, or another
            process trains in it, or it cannot be written.
    """

    def __init__(self, path: Path, config: TrainingConfig, *, resume: bool):
        self.path = path
        self.place: Place | None = None
        self.state: dict[str, Any] = {}
        self._main = self._open(config, resume=resume) if ranks.is_main() else None
        self.place, self.state = ranks.broadcast((self.place, self.state))
        with writing(path):
            self._sessions = JsonLines(path / f"sessions-{ranks.rank()}.jsonl")
        self._checkpoints = config.checkpoints
        self._saved_at = time.monotonic()

    def _open(self, config: TrainingConfig, *, resume: bool) -> _Main:
        """What the main process does for all."""
        path = self.path
        check_installed(config.tracking.trackers)
        if (path / "config.yaml").exists() and _started(path) and not resume:
            raise AgileError(f"{path} holds a run already. Go on with it by --resume, or choose another out=DIR.")
        lock = claim(path, config)
        with writing(path):
            (path / "checkpoints").mkdir(exist_ok=True)
            drafts = ("checkpoints/.*.draft", ".*.draft", ".minishop-*")
            for unfinished in (draft for pattern in drafts for draft in path.glob(pattern)):
                shutil.rmtree(unfinished)
            metrics = JsonLines(path / "metrics.jsonl")
            num_sent = len(self._logged())
            self._rewind()
            if resume and self.place is None:
                logger.warning("%s holds no checkpoint to go on from: this run starts anew.", path)
            logged = self._logged()
            tracking = Tracking(
                config.tracking.trackers,
                path,
                project=config.tracking.project,
                run_name=config.tracking.name or path.resolve().name,
                settings=dict(flat(config.model_dump(mode="json"))),
                last_steps={line["stage"]: line["step"] for line in logged},
                num_lines=len(logged),
                num_sent=num_sent,
            )
        return _Main(lock, metrics, tracking)

    def _rewind(self) -> None:
        """Cut the logs of all processes back to the last checkpoint, and note where that was."""
        found = checkpoints(self.path)
        place, saved = _read_state(found[-1]) if found else (None, {"sizes": {}, "state": {}})
        if found:
            ranks.check_same_number(f"The checkpoint {found[-1]}", saved.get("processes", 1))
        for log in (*self.path.glob("sessions-*.jsonl"), self.path / "metrics.jsonl"):
            os.truncate(log, min(saved["sizes"].get(log.name, 0), log.stat().st_size))  # less if somebody cut it
        self.place, self.state = place, saved["state"]

    # ---------------------------------------------------------------------------------------------------------------

    def log(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and the same numbers to the trackers; the main process alone writes."""
        if self._main is not None:
            with writing(self.path):
                self._main.metrics.append([{"stage": stage, "step": step, **metrics}])
            self._main.tracking.log(stage, step, metrics)

    def _logged(self) -> list[Any]:
        """The lines of metrics.jsonl."""
        return list(read_lines(self.path / "metrics.jsonl"))

    def log_sessions(self, sessions: Sequence[Session], **tags: Any) -> None:
        """Each process logs what it played."""
        with writing(self.path):
            append_sessions(self._sessions, sessions, **tags)

    def is_late(self) -> bool:
        """Whether `checkpoints.every_minutes` have passed since the last checkpoint, by the main process's clock."""
        minutes = self._checkpoints.every_minutes
        return minutes is not None and ranks.broadcast(time.monotonic() - self._saved_at >= 60 * minutes)

    def save(
        self,
        place: Place,
        engine: Engine,
        ahead: Mapping[int, Sequence[Trajectory]] | None = None,
        *,
        state: Mapping[str, Any] | None = None,
        keep: Collection[Place] = (),
    ) -> None:
        """Write a checkpoint: it is there whole or not at all. The last ones are kept. All processes call this.

        Args:
            ahead: What this process collected for later iterations, by iteration; `ahead()` gives it back.
            state: Whatever else the stage needs to go on, in JSON's types; `self.state` gives it back.
            keep: Older ones that are kept too.
        """
        own = {log.path.name: log.size for log in (self._sessions, *([self._main.metrics] if self._main else []))}
        sizes = {name: size for part in ranks.gather(own) for name, size in part.items()}
        with _whole(self.path / "checkpoints" / place.name) as draft:
            engine.save(draft, "engine")
            if ahead:
                log = JsonLines(draft / f"ahead-{ranks.rank()}.jsonl")
                for iteration, trajectories in ahead.items():
                    append_sessions(log, [s for t in trajectories for s in t.sessions], iteration=iteration)
                log.close()
            if self._main is not None:
                whole = {"place": asdict(place), "sizes": sizes, "state": dict(state or {})}
                (draft / "state.json").write_text(json.dumps({**whole, "processes": ranks.world_size()}))
        if self._main is not None:
            with writing(self.path):
                for old in checkpoints(self.path)[: -self._checkpoints.keep]:
                    if old.name not in {p.name for p in keep}:
                        shutil.rmtree(old)
        self.place = place
        self._saved_at = time.monotonic()

    def has(self, place: Place) -> bool:
        """Whether the checkpoint of a place is there."""
        return (self.path / "checkpoints" / place.name / "state.json").exists()

    def load(self, engine: Engine, place: Place | None = None) -> None:
        """Restore the engine from the last checkpoint, or from the one of `place`."""
        if place := place or self.place:
            engine.load(self.path / "checkpoints" / place.name, "engine")

    def ahead(self) -> dict[int, list[Trajectory]]:
        """What the last checkpoint holds of this process's trajectories for later iterations."""
        if self.place is None:
            return {}
        path = self.path / "checkpoints" / self.place.name / f"ahead-{ranks.rank()}.jsonl"
        streams: dict[int, dict[str, list[Session]]] = {}
        for record in read_lines(path) if path.exists() else ():
            session = session_from_json(record["session"])
            streams.setdefault(record["iteration"], {}).setdefault(session.stream_id, []).append(session)
        return {i: [Trajectory(name, tuple(found)) for name, found in s.items()] for i, s in streams.items()}

    def export(self, name: str, model: Any, tokenizer: Any) -> None:
        """Write an agent's weights and tokenizer as a Hugging Face folder `<run>/<name>`. All processes call this."""
        with _whole(self.path / name) as draft:
            if self._main is not None:
                model.save_pretrained(draft)
                tokenizer.save_pretrained(draft)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close(wait=error is None)  # after an error the others stand at some other barrier, or are gone

    def close(self, *, wait: bool = True) -> None:
        """Wait for the other processes, unless told not to, and leave the folder to others."""
        with writing(self.path):
            self._sessions.close()
        if wait:
            ranks.barrier()
        if self._main is not None:
            self._main.tracking.close()
            with writing(self.path):
                self._main.metrics.close()
                self._main.lock.close()


def checkpoints(path: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first (`ppo` follows `sft`); copies under other names are none."""
    folders = [p.parent for p in (path / "checkpoints").glob("*/state.json")]
    whole = [p for p in folders if re.fullmatch(r"(sft|ppo)-\d{6,}", p.name)]
    return sorted(whole, key=lambda p: (p.name.startswith("ppo"), int(p.name[4:])))


def _read_state(checkpoint: Path) -> tuple[Place, dict[str, Any]]:
    """Its place, and what else stands in its state.json.

    Raises:
        AgileError: That file is damaged.
    """
    try:
        saved = json.loads((checkpoint / "state.json").read_text())
        return Place(**saved["place"]), {"sizes": {**saved["sizes"]}, **saved}
    except (ValueError, KeyError, TypeError) as error:
        raise AgileError(
            f"The checkpoint {checkpoint} is damaged: its state.json cannot be read ({error!r}). {REMOVE}{checkpoint}."
        ) from None


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder that is there whole or not at all: yields a draft, in which all processes write; it becomes `target`.

    Raises:
        AgileError: The draft could not be written; then nothing is left of it.
    """
    draft, old = (target.with_name(f".{target.name}{end}") for end in (".draft", ".old.draft"))
    try:
        with writing(target):
            if ranks.is_main():
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
            ranks.barrier()
            try:
                yield draft
            except (OSError, AgileError):
                raise
            except Exception as error:  # torch, safetensors and tokenizers say in their own ways that a disk is full
                raise OSError(str(error).partition("\n")[0]) from error
            ranks.barrier()
            if ranks.is_main():
                for path in (*draft.rglob("*"), draft):
                    _sync(path)
                if target.exists():  # never there in part: it goes at once, and is removed where nobody looks for it
                    shutil.rmtree(old, ignore_errors=True)
                    os.replace(target, old)
                os.replace(draft, target)
                _sync(target.parent)
            ranks.barrier()
    finally:
        if ranks.is_main():
            shutil.rmtree(draft, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file whole or not at all."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with draft.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        _sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Bring a file, or a folder's list of files, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
