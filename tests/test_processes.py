"""A run in several processes is the run of one (docs/training.md)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
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
from tests.machine import free_port
from tests.processes import Processes
from tests.tiny import TINY
from tests.train_doors import train_doors

ROOT = Path(__file__).parents[1]
SETTINGS = (
    *TINY,
    "task.num_train_worlds=5",
    "ppo.streams_per_iteration=5",
    "ppo.num_iterations=5",
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


def nodes(launcher: str, out: Path) -> list[list[str]]:
    """What a user types on each of two machines with one process each; both are this one."""
    port = free_port()
    if launcher == "torchrun":
        meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=mine"]
        return [["torch.distributed.run", *meet, f"--rdzv-endpoint=127.0.0.1:{port}", "-m"]] * 2
    hosts = out.with_suffix(".hosts")
    hosts.write_text("node-1 slots=1\nnode-2 slots=1\n")
    meet = [f"--hostfile={hosts}", "--no_ssh", "--master_addr=127.0.0.1", f"--master_port={port}"]
    return [["deepspeed.launcher.runner", *meet, f"--node_rank={node}", "--module"] for node in range(2)]


def trained_on_two_nodes(launcher: str, out: Path, *words: str) -> Path:
    _, _, *train = command(out, *words)
    logs = [out.with_suffix(f".{node}") for node in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", *node, *train],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for node, log in zip(nodes(launcher, out), logs, strict=True)
    ]
    try:
        codes = [process.wait(timeout=900) for process in running]
    finally:
        for process in running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    printed = [log.read_text() for log in logs]
    assert codes == [0, 0], "\n".join(text[-3000:] for text in printed)
    assert sum(text.count("Trained: ") for text in printed) == 1
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
                assert value == pytest.approx(other[name], rel=0, abs=tolerance), (name, line["stage"], line["step"])
    for agent in ("sft", "ppo"):
        mine, theirs = (load_file(path / agent / "model.safetensors") for path in (found, expected))
        assert mine.keys() == theirs.keys()
        for name, weight in mine.items():
            torch.testing.assert_close(weight, theirs[name], rtol=0, atol=tolerance, msg=f"{agent} {name}")


def doors(out: Path, *, zero_stage: int, num: int) -> dict[str, Any]:
    """What `tests/train_doors.py` learned."""
    with Processes(train_doors, out, zero_stage, num=num) as processes:
        processes.finish()
    found: dict[str, Any] = torch.load(out, weights_only=False)
    return found


@pytest.fixture(scope="module")
def doors_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = doors(tmp_path_factory.mktemp("doors") / "alone.pt", zero_stage=0, num=1)
    assert found["num_policy_steps"] >= 20 and min(found["norms"]) > 1e-3
    assert {r for _, rewards in found["sampled"] for of_stream in rewards for r in of_stream} == {0.0, 1.0}
    moved = max(float((w.detach() - found["weights"][n]).abs().max()) for n, w in actor_critic().named_parameters())
    assert moved > 1e-2, "far more than the tolerance"
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("num", "zero_stage"), [(2, 2), (2, 3), (3, 1)])
def test_several_processes_learn_from_rewards_what_one_does(
    doors_alone: dict[str, Any], tmp_path: Path, num: int, zero_stage: int
) -> None:
    """Over more than 20 steps of PPO on sessions with different rewards: the same losses, gradients and weights.

    The critic starts far off: its explained variance is -27 here, and so the same to five digits.
    """
    found = doors(tmp_path / "several.pt", zero_stage=zero_stage, num=num)
    assert found["sampled"] == doors_alone["sampled"]
    assert found["norms"] == pytest.approx(doors_alone["norms"], rel=0, abs=1e-5)
    for mine, theirs in zip(found["figures"], doors_alone["figures"], strict=True):
        assert mine.pop("explained_variance") == pytest.approx(theirs["explained_variance"], rel=1e-5, abs=0)
        assert mine == pytest.approx({name: theirs[name] for name in mine}, rel=0, abs=1e-5)
        assert theirs.keys() == {*mine, "explained_variance"}
    for name, weight in doors_alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    path = trained(tmp_path_factory.mktemp("alone") / "run")
    last = lines(path)[-1]
    assert last["stage"] == "ppo" and last["num_rows"] > 32, (
        "more than 20 steps move it: 3 batches, 2 epochs, 4 iterations"
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "stage"), [("deepspeed", 2), ("torchrun", 3)])
def test_two_nodes_learn_what_one_process_does(alone: Path, tmp_path: Path, launcher: str, stage: int) -> None:
    """Same sessions, losses and weights over more than 20 steps of PPO that move the policy."""
    found = trained_on_two_nodes(launcher, tmp_path / "run", f"engine.zero_stage={stage}")
    assert {p.name for p in found.glob("sessions-*.jsonl")} == {"sessions-0.jsonl", "sessions-1.jsonl"}
    assert_same(found, alone, 1e-5)


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_same_run(tmp_path: Path) -> None:
    """Other moments are in test_kills.py."""
    words = ("engine.zero_stage=3", "rollout.lag=1")
    whole, killed = trained(tmp_path / "whole", *words, num=2), tmp_path / "killed"
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
