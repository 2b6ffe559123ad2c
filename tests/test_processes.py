"""A run in several processes is the run of one (docs/training.md)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from agile.config import load_config
from agile.errors import AgileError
from agile.session_log import logged_sessions
from agile.training import check_processes, check_streams
from tests.doors import actor_critic
from tests.tiny import TINY

ROOT = Path(__file__).parents[1]
SETTINGS = (
    *TINY,
    "task.num_train_worlds=5",
    "ppo.streams_per_iteration=5",
    "ppo.num_iterations=4",
    "ppo.value_warmup_epochs=1",
    "ppo.batch_size=16",
    "ppo.checkpoint_every=2",
)


def command(out: Path, *words: str, num: int = 1) -> list[str]:
    """What a user types to train in `num` processes."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num}", "-m"] if num > 1 else []
    train = ["agile.cli", "train", str(ROOT / "configs" / "demo.yaml"), f"out={out}", *SETTINGS, *words]
    return [sys.executable, "-m", *launcher, *train]


def run(out: Path, *words: str, num: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(out, *words, num=num),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )


def trained(out: Path, *words: str, num: int = 1) -> Path:
    done = run(out, *words, num=num)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Trained: ") == 1
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def sampled(path: Path) -> dict[tuple[int | None, str], list[Any]]:
    """The tokens of every session, by iteration and name."""
    return {
        (logged.step, logged.session.id): [segment.token_ids for segment in logged.session.segments]
        for logged in logged_sessions(path)
    }


def assert_same(found: Path, expected: Path, tolerance: float) -> None:
    assert sampled(found) == sampled(expected)
    for line, other in zip(lines(found), lines(expected), strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            if name != "seconds" and isinstance(value, int | float):
                assert value == pytest.approx(other[name], rel=1e-4, abs=tolerance), (name, line["stage"], line["step"])
    for agent in ("sft", "ppo"):
        mine, theirs = (load_file(path / agent / "model.safetensors") for path in (found, expected))
        assert mine.keys() == theirs.keys()
        for name, weight in mine.items():
            torch.testing.assert_close(weight, theirs[name], rtol=0, atol=tolerance, msg=f"{agent} {name}")


def doors(out: Path, *, zero_stage: int, num: int) -> dict[str, Any]:
    """What `tests/train_doors.py` learned."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num}", "-m"] if num > 1 else []
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "tests.train_doors", str(out), str(zero_stage)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = torch.load(out, weights_only=False)
    return found


@pytest.fixture(scope="module")
def doors_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = doors(tmp_path_factory.mktemp("doors") / "alone.pt", zero_stage=0, num=1)
    assert len(found["norms"]) >= 20 and min(found["norms"]) > 1e-3
    assert {r for _, rewards in found["sampled"] for of_stream in rewards for r in of_stream} == {0.0, 1.0}
    moved = max(float((w.detach() - found["weights"][n]).abs().max()) for n, w in actor_critic().named_parameters())
    assert moved > 1e-2, "far more than the tolerance"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_processes_learn_from_rewards_what_one_does(
    doors_alone: dict[str, Any], tmp_path: Path, zero_stage: int
) -> None:
    """Over more than 20 steps of PPO on sessions with different rewards: the same losses, gradients and weights."""
    found = doors(tmp_path / "two.pt", zero_stage=zero_stage, num=2)
    assert found["sampled"] == doors_alone["sampled"]
    assert found["norms"] == pytest.approx(doors_alone["norms"], rel=1e-4, abs=1e-5)
    for mine, theirs in zip(found["figures"], doors_alone["figures"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for name, weight in doors_alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    path = trained(tmp_path_factory.mktemp("alone") / "run")
    last = lines(path)[-1]
    assert last["stage"] == "ppo" and last["num_rows"] > 32, "20 steps need 3 batches in 2 epochs of 4 iterations"
    return path


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of two processes with these settings; it is made once."""

    @cache
    def made(*words: str) -> Path:
        return trained(tmp_path_factory.mktemp("two") / "run", *words, num=2)

    return made


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_learn_what_one_does(alone: Path, of_two: Callable[..., Path], stage: int) -> None:
    """Same sessions, losses and weights over 4 iterations of PPO, more than 20 steps of the optimizer."""
    found = of_two(f"engine.zero_stage={stage}")
    assert {p.name for p in found.glob("sessions-*.jsonl")} == {"sessions-0.jsonl", "sessions-1.jsonl"}
    assert_same(found, alone, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("words", [("engine.zero_stage=2",), ("engine.zero_stage=3", "rollout.lag=1")])
def test_killed_and_resumed_it_is_the_same_run(
    of_two: Callable[..., Path], tmp_path: Path, words: tuple[str, ...]
) -> None:
    whole = of_two(*words)
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(killed, *words, num=2),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not (killed / "checkpoints" / "ppo-000002").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "ppo").exists(), "it was killed too late"

    refused = run(killed, *words, "--resume", num=1)
    while "Another process works" in refused.stderr:  # the launcher is dead; what it started finds out in a while
        refused = run(killed, *words, "--resume", num=1)
    assert refused.returncode == 2
    assert "was written by 2 processes, but now there is 1" in " ".join(refused.stderr.split())
    trained(killed, *words, "--resume", num=2)
    assert_same(killed, whole, 0.0)


def test_more_processes_than_work_are_refused() -> None:
    few = ["ppo.batch_size=4", "sft.batch_size=8", "ppo.streams_per_iteration=5"]
    check_processes(load_config(None, few), 4)
    with pytest.raises(AgileError, match=r"ppo.batch_size is 4, fewer than the 5 processes .* ppo.batch_size=5"):
        check_processes(load_config(None, few), 5)
    with pytest.raises(AgileError, match=r"streams_per_iteration is 5, fewer than the 6"):
        check_processes(load_config(None, [*few, "ppo.batch_size=8"]), 6)
    check_processes(load_config(None, [*few, "ppo.num_iterations=0"]), 8)


def test_more_processes_than_streams_are_refused() -> None:
    check_streams(4, 0, 4)
    with pytest.raises(AgileError, match=r"4 train streams .* fewer than the 5 processes .* at most 4.*\(2 are\)"):
        check_streams(4, 2, 5)


def test_vllm_inside_several_processes_is_refused() -> None:
    config = load_config(None, ["rollout.policy=vllm"])
    check_processes(config, 1)
    with pytest.raises(AgileError, match=r"would join the 2 of this run.*rollout.policy=vllm-server"):
        check_processes(config, 2)


@pytest.mark.slow
def test_other_commands_refuse_a_launcher(tmp_path: Path) -> None:
    words = command(tmp_path, num=2)
    done = subprocess.run(
        [*words[: words.index("train")], "bench", str(ROOT / "configs" / "demo.yaml")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode != 0
    assert done.stderr.count("agile bench runs in one process") == 1
