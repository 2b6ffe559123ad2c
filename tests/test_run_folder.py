"""A run folder: it keeps what is there, loses nothing when a disk is full, and goes on where it was killed."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from agile.config import RunConfig, load_config
from agile.engine import Engine
from agile.errors import AgileError
from agile.run_folder import Place, RunFolder, claim, write_atomically
from agile.session_log import read_lines

CONFIG = RunConfig()
OTHER = load_config(None, ["seed=1"])


class FakeEngine:
    """Saves a file, after `error` has come or not."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.loaded: Path | None = None

    def save(self, folder: Path, tag: str) -> None:
        (folder / tag).write_text("half")
        if self.error is not None:
            raise self.error
        (folder / tag).write_text("whole")

    def load(self, folder: Path, tag: str) -> None:
        self.loaded = folder / tag


@pytest.fixture
def engine() -> Engine:
    return cast(Engine, FakeEngine())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine"


def opened(path: Path, config: RunConfig = CONFIG, resume: bool = False) -> RunFolder:
    return RunFolder(path, config, resume=resume)


def files(path: Path) -> dict[str, bytes]:
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def steps(path: Path) -> list[tuple[str, int]]:
    return [(row["stage"], row["step"]) for row in read_lines(path / "metrics.jsonl")]


# --------------------------------------------------------------------------------------------------------------------
# Whose folder it is


def test_config_is_saved_as_resolved(path: Path) -> None:
    opened(path, OTHER).close()
    assert load_config(path / "config.yaml") == OTHER


def test_existing_run_needs_resume(path: Path) -> None:
    run = opened(path)
    run.log("sft", 1, {"loss": 2.0})
    run.close()
    before = files(path)
    with pytest.raises(AgileError, match=r"holds a run already.*--resume.*out=DIR"):
        opened(path)
    with pytest.raises(AgileError, match=r"seed was 0, is now 1.*config.yaml.*out=DIR"):
        opened(path, OTHER, resume=True)
    assert files(path) == before
    opened(path, resume=True).close()


def test_start_that_failed_at_once_gives_its_folder_to_another_config(path: Path) -> None:
    opened(path).close()
    for made in ("minishop/train", ".minishop-1"):
        (path / made).mkdir(parents=True)
        (path / made / "qa.jsonl").write_text("of the seed that it had")
    opened(path, OTHER).close()
    assert load_config(path / "config.yaml") == OTHER
    assert not any(path.glob("*minishop*"))


def test_foreign_folder_is_left_alone(path: Path) -> None:
    (path / "ppo").mkdir(parents=True)
    (path / "ppo" / "thesis.tex").write_text("years of work")
    before = files(path)
    for resume in (False, True):
        with pytest.raises(AgileError, match=r"not empty \(ppo\).*out=DIR"):
            opened(path, resume=resume)
    assert files(path) == before


def test_another_process_in_the_folder(path: Path) -> None:
    opened(path).close()
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        with pytest.raises(AgileError, match=r"Another process works in .*mine"):
            opened(path, OTHER, resume=True)
        assert load_config(path / "config.yaml") == CONFIG
        process.kill()
    opened(path, resume=True).close()  # a killed process holds nothing


@pytest.mark.parametrize("where", ["runs", "runs/mine"])
def test_file_where_the_folder_should_be(tmp_path: Path, where: str) -> None:
    file = tmp_path / where
    file.parent.mkdir(exist_ok=True)
    file.write_text("not a folder")
    with pytest.raises(AgileError, match=r"Cannot write to .*out=DIR"):
        opened(tmp_path / "runs" / "mine")
    assert file.read_text() == "not a folder"


def test_damaged_config_of_the_folder(path: Path) -> None:
    run = opened(path)
    run.log("sft", 1, {})
    run.close()
    (path / "config.yaml").write_text("seed: [")
    with pytest.raises(AgileError, match=r"config.yaml is not YAML"):
        opened(path, resume=True)


# --------------------------------------------------------------------------------------------------------------------
# Killed and resumed


def test_resume_cuts_the_logs_back_to_the_checkpoint(path: Path, engine: Engine) -> None:
    run = opened(path)
    run.log("sft", 1, {"loss": 2.0})
    run.save(Place("sft", 1), engine)
    run.log("sft", 2, {"loss": 1.0})
    run.close()
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sf')  # killed while writing

    resumed = opened(path, resume=True)
    assert resumed.place == Place("sft", 1)
    assert steps(path) == [("sft", 1)]
    resumed.log("sft", 2, {"loss": 1.0})
    assert steps(path) == [("sft", 1), ("sft", 2)]
    resumed.load(engine)
    assert cast(FakeEngine, engine).loaded == path / "checkpoints" / "sft-000001" / "engine"
    resumed.close()


def test_resume_without_a_checkpoint_starts_anew_and_says_so(
    path: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    run = opened(path)
    run.log("sft", 1, {})
    run.close()
    assert not caplog.messages
    resumed = opened(path, resume=True)
    assert resumed.place is None and steps(path) == []
    assert caplog.messages == [f"{path} holds no checkpoint to go on from: this run starts anew."]
    resumed.load(engine)
    assert cast(FakeEngine, engine).loaded is None
    resumed.close()


def test_log_that_somebody_removed_is_not_padded_with_zeros(path: Path, engine: Engine) -> None:
    run = opened(path)
    run.log("sft", 1, {})
    run.save(Place("sft", 1), engine)
    run.close()
    (path / "metrics.jsonl").unlink()
    opened(path, resume=True).close()
    assert (path / "metrics.jsonl").read_bytes() == b""


def test_last_checkpoints_are_kept_in_the_order_of_the_schedule(path: Path, engine: Engine) -> None:
    run = opened(path)
    for place in (Place("sft", 9), Place("sft", 10), Place("ppo", 1), Place("ppo", 2)):
        run.save(place, engine)
    run.close()
    kept = sorted(p.name for p in (path / "checkpoints").iterdir())
    assert kept == ["ppo-000001", "ppo-000002"] and len(kept) == CONFIG.checkpoints.keep
    resumed = opened(path, resume=True)
    assert resumed.place == Place("ppo", 2)
    resumed.close()


def test_a_checkpoint_is_late_by_the_clock(path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def set_clock(seconds: float) -> None:
        monkeypatch.setattr("agile.run_folder.time.monotonic", lambda: seconds)

    def is_late(seconds: float) -> bool:
        set_clock(seconds)
        return run.is_late()

    set_clock(1000.0)
    run = opened(path, load_config(None, ["checkpoints.every_minutes=2"]))
    assert [is_late(s) for s in (1000.0, 1119.0, 1120.0, 1500.0)] == [False, False, True, True]
    run.save(Place("sft", 1), engine)
    assert [is_late(s) for s in (1500.0, 1619.0, 1620.0)] == [False, False, True]
    run.close()


def test_draft_of_a_killed_run_is_no_checkpoint(path: Path, engine: Engine) -> None:
    run = opened(path)
    run.save(Place("sft", 1), engine)
    run.close()
    draft = path / "checkpoints" / ".sft-000002.draft"
    draft.mkdir()
    state = (path / "checkpoints" / "sft-000001" / "state.json").read_text()
    (draft / "state.json").write_text(state.replace('"step": 1', '"step": 2'))
    resumed = opened(path, resume=True)
    assert resumed.place == Place("sft", 1) and not draft.exists()
    resumed.close()


def test_what_others_put_beside_the_checkpoints_is_none(path: Path, engine: Engine) -> None:
    run = opened(path)
    run.save(Place("sft", 1), engine)
    run.close()
    saved = path / "checkpoints" / "sft-000001"
    for copied in ("sft-000001-mine", "backup"):
        shutil.copytree(saved, saved.with_name(copied))
    saved.with_name(".left-by-a-file-system").touch()
    resumed = opened(path, resume=True)
    assert resumed.place == Place("sft", 1)
    resumed.close()


@pytest.mark.parametrize("text", ["", '{"place": {"sta', "[]", '{"place": {}}'])
def test_a_checkpoint_whose_state_is_damaged(path: Path, engine: Engine, text: str) -> None:
    run = opened(path)
    for step in (1, 2):
        run.log("sft", step, {})
        run.save(Place("sft", step), engine)
    run.close()
    damaged = path / "checkpoints" / "sft-000002"
    (damaged / "state.json").write_text(text)
    with pytest.raises(AgileError, match=r"sft-000002 is damaged.* once you have removed .*sft-000002\.$"):
        opened(path, resume=True)
    assert steps(path) == [("sft", 1), ("sft", 2)]
    shutil.rmtree(damaged)
    opened(path, resume=True).close()
    assert steps(path) == [("sft", 1)]


def test_tensorboard_shows_every_step_once(path: Path, engine: Engine) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    run = opened(path)
    for step in (1, 2, 3, 4):
        run.log("sft", step, {"loss": float(step), "note": "text is left out"})
    run.save(Place("sft", 4), engine)
    run.log("ppo", 1, {"score": 0.1})
    run.save(Place("ppo", 1), engine)
    run.log("ppo", 2, {"score": 0.2})  # lost
    run.close()
    resumed = opened(path, resume=True)
    for step in (2, 3):
        resumed.log("ppo", step, {"score": step / 10})
    resumed.close()

    def shown(stage: str, tag: str) -> list[tuple[int, float]]:
        events = EventAccumulator(str(path / "tensorboard" / stage)).Reload()
        return [(e.step, round(e.value, 3)) for e in events.Scalars(tag)]

    assert shown("sft", "sft/loss") == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert shown("ppo", "ppo/score") == [(1, 0.1), (2, 0.2), (3, 0.3)]


# --------------------------------------------------------------------------------------------------------------------
# Full disks


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


@pytest.mark.usefixtures("full_disk")
def test_full_disk_at_the_start(path: Path) -> None:
    with pytest.raises(AgileError, match=r"Cannot write to .*: No space left on device\. Free space"):
        opened(path)
    assert not (path / "config.yaml").exists()


def test_full_disk_at_a_log_line(path: Path, request: pytest.FixtureRequest) -> None:
    run = opened(path)
    request.getfixturevalue("full_disk")
    with pytest.raises(AgileError, match=r"No space left on device.*--resume"):
        run.log("sft", 1, {"loss": 1.0})


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 8\nframes"),  # torch.save
        Exception("No space left on device (os error 28)"),  # tokenizers, safetensors
        AgileError("The checkpoint cannot be written."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_failed_checkpoint_leaves_the_last_one(path: Path, engine: Engine, error: Exception) -> None:
    run = opened(path)
    run.save(Place("sft", 1), engine)
    before = files(path)
    cast(FakeEngine, engine).error = error
    with pytest.raises(AgileError) as caught:
        run.save(Place("sft", 2), engine)
    assert "\n" not in str(caught.value)
    assert files(path) == before and run.place == Place("sft", 1)
    run.close()


def test_failed_export_leaves_the_last_one(path: Path) -> None:
    class Part:
        def __init__(self, error: Exception | None = None) -> None:
            self.error = error

        def save_pretrained(self, folder: Path) -> None:
            (folder / f"{len(list(folder.iterdir()))}").write_text("x")
            if self.error is not None:
                raise self.error

    run = opened(path)
    run.export("sft", Part(), Part())
    before = files(path)
    assert {"sft/0", "sft/1"} <= set(before)
    with pytest.raises(AgileError, match=r"Cannot write to .*sft: No space"):
        run.export("sft", Part(), Part(Exception("No space left on device (os error 28)")))
    assert files(path) == before
    run.close()


@pytest.mark.usefixtures("full_disk")
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert files(tmp_path) == {"f": b"old"}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system of its own, which needs root")
def test_disk_that_is_really_full(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        run = opened(path)
        run.save(Place("sft", 1), engine)
        with pytest.raises(AgileError, match="No space left on device"):
            for step in range(100):
                run.log("ppo", step, {"x" * 1000: "y" * 1000})
        resumed = opened(path, resume=True)
        assert resumed.place == Place("sft", 1) and steps(path) == []
        resumed.close()
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_claim_is_for_one_config(path: Path) -> None:
    claim(path, CONFIG).close()
    claim(path, CONFIG).close()
    (path / "report.json").write_text("{}")
    with pytest.raises(AgileError, match="seed was 0, is now 1"):
        claim(path, OTHER)


def test_state_of_a_checkpoint_names_its_place(path: Path, engine: Engine) -> None:
    run = opened(path)
    run.log("sft", 7, {"loss": 1.0})
    run.save(Place("sft", 7), engine)
    run.close()
    state: dict[str, Any] = json.loads((path / "checkpoints" / "sft-000007" / "state.json").read_text())
    assert state["place"] == {"stage": "sft", "step": 7}
    size = (path / "metrics.jsonl").stat().st_size
    assert state["sizes"] == {"sessions-0.jsonl": 0, "metrics.jsonl": size}
    assert state["processes"] == 1
