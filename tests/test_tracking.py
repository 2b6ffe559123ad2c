"""Trackers: every step once over kills and resumes, config as hyper-parameters, and no failure stops a run."""

import importlib.util
import json
import logging
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agile.errors import AgileError
from agile.tracking import Tracking, check_installed

SETTINGS = {"seed": 0, "model.path": None, "task.test_groups": ["a", "b"]}


def opened(folder: Path, *names: str, num_lines: int = 0, num_sent: int = 0, **last_steps: int) -> Tracking:
    return Tracking(
        names,
        folder,
        project="agile-test",
        run_name="mine",
        settings=SETTINGS,
        last_steps=last_steps,
        num_lines=num_lines,
        num_sent=num_sent,
    )


def killed_twice(folder: Path, name: str, between: Callable[[], None] = lambda: None) -> None:
    """Two steps of imitation, then PPO killed at steps 4 and 3 with a checkpoint after its first."""
    first = opened(folder, name)
    for step in (1, 2):
        first.log("sft", step, {"loss": 1 / step, "note": "text is left out"})
    for step in (1, 2, 3, 4):
        first.log("ppo", step, {"score": step / 10})
    first.close()
    between()
    second = opened(folder, name, num_lines=3, num_sent=6, sft=2, ppo=1)
    for step in (2, 3):
        second.log("ppo", step, {"score": step / 10})
    second.close()
    between()
    third = opened(folder, name, num_lines=3, num_sent=5, sft=2, ppo=1)
    for step in (2, 3, 4, 5):
        third.log("ppo", step, {"score": step / 10})
    third.close()


def test_tensorboard_has_every_step_once_and_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )
    from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

    # files of one process and one second are read in the order of this number as text, in which 10 comes before 9
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    killed_twice(tmp_path, "tensorboard")
    shown = EventAccumulator(str(tmp_path / "tensorboard" / "ppo")).Reload().Scalars("ppo/score")
    assert [(e.step, round(e.value, 3)) for e in shown] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (5, 0.5)]
    (settings,) = tmp_path.glob("tensorboard/*/*/hparams.yml")
    assert "model.path: None" in settings.read_text()


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="the extra mlflow is not installed")
def test_mlflow_has_every_step_once_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow: Any = importlib.import_module("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    killed_twice(tmp_path, "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("agile-test").experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "tracking.json").read_text())["mlflow"]
    history = client.get_metric_history(run.info.run_id, "ppo/score")
    assert [(m.step, m.value) for m in history] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (5, 0.5)]
    assert run.data.params["seed"] == "0" and run.info.run_name == "mine"


def next_second() -> None:
    """W&B names the folder of a run by the second: two in one would write over each other."""
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.01)


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a log of W&B, which is one of LevelDB behind 7 bytes: checksum, length, type, in blocks."""
    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + length > len(data):  # is being written
            return
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or a last part
            yield part
            part = b""


def wandb_logs(folder: Path, num: int, records: Any) -> list[list[Any]]:
    """The records of `num` runs, once their service has written the last ones: it may do so after they have ended."""
    until = time.monotonic() + 300
    while True:
        paths = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
        logs = [[records.Record.FromString(data) for data in wandb_records(path)] for path in paths]
        if len(logs) == num and all(log and log[-1].HasField("exit") for log in logs):
            return logs
        assert time.monotonic() < until, "a log of W&B does not end"
        time.sleep(0.05)


@pytest.mark.frameworks
def test_wandb_has_every_step_once_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    killed_twice(tmp_path, "wandb", between=next_second)
    sent, ids = [], set()
    for log in wandb_logs(tmp_path, 2, wandb):  # the second run has nothing new to send
        for record in log:
            ids |= {record.run.run_id} if record.HasField("run") else set()
            if record.HasField("history"):
                row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                sent.append((record.history.step.num, row.get("ppo/step"), row.get("ppo/score")))
    assert ids == {json.loads((tmp_path / "tracking.json").read_text())["wandb"]}
    assert sent[2:] == [(3, 1, 0.1), (4, 2, 0.2), (5, 3, 0.3), (6, 4, 0.4), (7, 5, 0.5)] and len(sent) == 7


def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def down(self: Tracking, name: str, stage: str) -> Any:
        if name == "mlflow":
            raise ConnectionError("no route to host")
        return start(self, name, stage)

    start = Tracking._start
    monkeypatch.setattr(Tracking, "_start", down)
    tracking = opened(tmp_path, "mlflow", "tensorboard")
    with caplog.at_level(logging.WARNING):
        tracking.log("sft", 1, {"loss": 1.0})
        tracking.log("sft", 2, {"loss": 0.5})
    tracking.close()
    (warning,) = (r.getMessage() for r in caplog.records if r.name == "agile.tracking")
    assert "mlflow" in warning and "no route to host" in warning and "metrics.jsonl" in warning
    assert list(tmp_path.glob("tensorboard/sft/events*"))


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AgileError, match=r'pip install -e "\.\[wandb\]"'):
        check_installed(["wandb"])
