"""Real vLLM servers: log-probabilities as in process, weights through a folder, and servers that are killed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from agile.errors import AgileError
from agile.policies.vllm_http import REMEDY, server_command
from agile.policies.vllm_server import VLLMServerPolicy
from agile.types import Completion
from tests.machine import free_port
from tests.policies.contract import PolicyContract
from tests.policies.rollout_engines import PROMPTS, largest_error, make_model, perturb, sample, save, weights

# several servers with threads on every core wait for each other
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


class Server:
    """A vLLM server on a free port of this machine, in a process group of its own."""

    def __init__(self, folder: Path, log: Path, *, drop: tuple[str, ...] = (), extra: tuple[str, ...] = ()):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = server_command(
            folder, self.port, dtype="float32", max_num_seqs=32, kv_cache_gib=0.05, enforce_eager=True, block_size=32
        )
        # the worker in the engine's process: it would import vLLM once more
        self.command = [part for part in command if part not in drop] + [
            "--distributed-executor-backend",
            "uni",
            *extra,
        ]
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, start_new_session=True, env=os.environ | ONE_THREAD
            )
        return self

    def wait(self, timeout_s: float = 800.0) -> Server:
        end = time.monotonic() + timeout_s
        with httpx2.Client(trust_env=False, verify=False) as client:
            while time.monotonic() < end:
                with suppress(httpx2.RequestError):
                    if client.get(f"{self.url}/health").status_code == 200:
                        return self
                assert self.process is not None and self.process.poll() is None, self.log.read_text()[-3000:]
                time.sleep(0.5)
        raise AssertionError(f"not up after {timeout_s} s: {self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def lm() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture(scope="module")
def folder(lm: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(lm, tmp_path_factory.mktemp("model") / "lm")


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[list[Server]]:
    both = [Server(folder, folder.parent / f"server{i}.log") for i in range(2)]
    try:
        for server in both:
            server.start()
        for server in both:
            server.wait()
        yield both
    finally:
        for server in both:
            server.kill()


def connect(folder: Path, servers: list[Server], **arguments: Any) -> VLLMServerPolicy:
    arguments = {"dtype": "float32", "weights_dir": folder.parent / "weights", "retry_s": 0.5, **arguments}
    return VLLMServerPolicy(folder, [s.url for s in servers], **arguments)


@pytest.fixture(scope="module")
def connected(folder: Path, servers: list[Server]) -> Iterator[VLLMServerPolicy]:
    policy = connect(folder, servers)
    yield policy
    policy.close()


@pytest.fixture
def policy(connected: VLLMServerPolicy) -> Iterator[VLLMServerPolicy]:
    yield connected
    connected.temperature = 1.0


class TestVLLMServerPolicy(PolicyContract):
    pass


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_those_of_a_plain_forward_pass(
    policy: VLLMServerPolicy, lm: LlamaForCausalLM, temperature: float
) -> None:
    policy.temperature = temperature
    assert largest_error(lm, policy, temperature) < 1e-4


def test_a_long_prompt_is_cached(policy: VLLMServerPolicy) -> None:
    prompt = list(range(3, 103))
    usages = [sample(policy, [prompt])[0].usage for _ in range(4)]
    assert {u.prompt_tokens for u in usages} == {100} and usages[-1].cached_tokens == 96


def test_weights_are_taken_over_again_and_again(
    policy: VLLMServerPolicy, lm: LlamaForCausalLM, folder: Path, servers: list[Server]
) -> None:
    for version in range(1, 6):
        before = largest_error(lm, policy)
        perturb(lm, version)
        assert before < 1e-4 < largest_error(lm, policy)
        policy.update_weights(weights(lm), version)
        assert largest_error(lm, policy) < 1e-4
        assert {c.policy_version for c in sample(policy, PROMPTS)} == {version}
    assert sorted(f.name[:2] for f in (folder.parent / "weights").iterdir()) == ["4-", "5-"]


@pytest.mark.parametrize("fault", ["nothing", "tensor", "head", "nan"])
def test_a_reload_that_does_not_reload_is_noticed(
    policy: VLLMServerPolicy, lm: LlamaForCausalLM, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that the servers are told of is an older one, lacks a tensor, or has one of no numbers.

    A server may hold anything in the place of what was lacking, NaN too.
    """
    perturb(lm, 77)
    name = "lm_head.weight" if fault == "head" else "model.layers.1.mlp.up_proj.weight"
    older = policy._pushed.folder if policy._pushed else None
    ask = policy._ask

    copying = threading.Lock()  # both servers are told at once

    def spoilt(told: Path) -> Path:
        if fault == "nothing":
            return older or told
        bad = told.with_name(f"bad-{fault}")
        with copying:
            if not bad.exists():
                shutil.copytree(told, bad)
                (file,) = bad.glob("*.safetensors")
                tensors = load_file(file)
                spoilt_tensor = tensors.pop(name)
                if fault == "nan":
                    tensors[name] = torch.full_like(spoilt_tensor, torch.nan)
                save_file(tensors, file, metadata={"format": "pt"})
        return bad

    def faulty(server: Any, path: str, body: Any = None, timeout_s: float = 60.0) -> Any:
        if path == "/collective_rpc":
            told = Path(body["kwargs"]["weights_path"])
            body = {**body, "kwargs": {"weights_path": str(spoilt(told))}}
        return ask(server, path, body, timeout_s)

    version = policy.version + 1
    with monkeypatch.context() as patched:
        patched.setattr(policy, "_ask", faulty)
        with pytest.raises(AgileError, match=r"127.0.0.1:.* did not take over the weights"):
            policy.update_weights(weights(lm), version)
    policy.update_weights(weights(lm), version)
    assert largest_error(lm, policy) < 1e-4


def test_another_run_s_weights_are_noticed(
    policy: VLLMServerPolicy, lm: LlamaForCausalLM, folder: Path, servers: list[Server]
) -> None:
    other = connect(folder, servers, weights_dir=folder.parent / "others")
    with pytest.raises(AgileError, match=rf"holds the weights {policy.version}-\w+, expected default"):
        sample(other, [[7]])
    other.update_weights(weights(lm), 30)
    assert largest_error(lm, other) < 1e-4
    with pytest.raises(AgileError, match=rf"holds the weights 30-\w+, expected {policy.version}-\w+: another run"):
        sample(policy, [[7]])
    other.close()
    policy.update_weights(weights(lm), policy.version + 1)
    assert largest_error(lm, policy) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"name": "gpt"}, r"serves \['agile'\], expected 'gpt'"),
        ({"timeout_s": 3.0, "weights_dir": None}, "set vllm.weights_dir to a folder that they see"),
    ],
)
def test_what_does_not_fit_is_refused(
    folder: Path, servers: list[Server], lm: LlamaForCausalLM, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(AgileError, match=reason):
        connect(folder, servers, **arguments).update_weights(weights(lm), 1)


@pytest.mark.parametrize(("change", "reason"), [(-1, "vocabulary larger than"), (1, "HTTP 400: .*out-of-vocab")])
def test_another_vocabulary_is_refused(servers: list[Server], tmp_path: Path, change: int, reason: str) -> None:
    size = make_model().config.vocab_size + change
    other = save(make_model(vocab_size=size), tmp_path / "other")
    with pytest.raises(AgileError, match=f"127.0.0.1:.*{reason}"):
        connect(other, servers)


def test_a_killed_server_loses_no_request_and_comes_back_with_the_current_weights(
    policy: VLLMServerPolicy, lm: LlamaForCausalLM, servers: list[Server], caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [[3 + i % 90, 5 + i // 2] for i in range(100)]
    before = sample(policy, prompts, max_tokens=150)
    answered: list[int] = []

    async def one(i: int) -> Completion:
        completion = await policy.complete(prompts[i], max_tokens=150, stop=(), seed=i)
        answered.append(i)
        return completion

    async def killed_midway() -> list[Completion]:
        assert servers[1].process is not None
        os.killpg(servers[1].process.pid, signal.SIGSTOP)  # or it may be through before the kill
        tasks = [asyncio.ensure_future(one(i)) for i in range(100)]
        while len(answered) < 10:
            await asyncio.sleep(0.01)
        assert policy._servers[1].active > 10
        os.killpg(servers[1].process.pid, signal.SIGKILL)
        return await asyncio.wait_for(asyncio.gather(*tasks), 600)

    found = asyncio.run(killed_midway())
    assert sorted(answered) == list(range(100))
    assert [c.token_ids for c in found] == [c.token_ids for c in before]
    assert f"{servers[1].url} is left out" in caplog.text and "1 other servers are left" in caplog.text

    servers[1].kill()
    servers[1].start().wait()  # with the weights of the model folder

    async def until_back() -> None:
        while not policy._servers[1].up:
            await policy.complete([7], max_tokens=2, stop=(), seed=0)
            await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(until_back(), 300))
    policy._servers[0].up = False  # ask the restarted one alone
    policy._servers[0].next_try = time.monotonic() + 1000
    assert largest_error(lm, policy) < 1e-4
    policy._servers[0].up = True


def test_the_only_server_killed_ends_the_run_in_time_with_the_remedy(
    folder: Path, lm: LlamaForCausalLM, servers: list[Server]
) -> None:
    policy = connect(folder, servers[:1], timeout_s=4.0)
    policy.update_weights(weights(lm), 50)

    async def killed() -> list[Completion | BaseException]:
        assert servers[0].process is not None
        os.killpg(servers[0].process.pid, signal.SIGSTOP)  # or it may be through with some before the kill
        tasks = [asyncio.ensure_future(policy.complete([7, i], max_tokens=100, stop=(), seed=i)) for i in range(20)]
        while policy._servers[0].active < 20:
            await asyncio.sleep(0.005)
        os.killpg(servers[0].process.pid, signal.SIGKILL)
        return await asyncio.gather(*tasks, return_exceptions=True)

    started = time.monotonic()
    errors = asyncio.run(killed())
    assert time.monotonic() - started < 60
    assert len(errors) == 20
    for error in errors:
        assert isinstance(error, AgileError)
        assert "No vLLM server answered within 4 s" in str(error) and servers[0].url in str(error)
        assert REMEDY in str(error)
    with pytest.raises(AgileError, match="No vLLM server answered"):
        connect(folder, servers[:1])
    policy.close()


def test_a_server_without_processed_logprobs_or_dev_mode_is_refused(
    folder: Path, lm: LlamaForCausalLM, servers: list[Server]
) -> None:
    """Both at once, since a start takes long."""
    for server in servers:
        server.kill()
    drop = ("VLLM_SERVER_DEV_MODE=1", "--logprobs-mode", "processed_logprobs")
    server = Server(folder, folder.parent / "plain.log", drop=drop, extra=("--max-model-len", "128"))
    try:
        server.start().wait()
        with pytest.raises(AgileError, match=r"context of 128 tokens, expected 256.*--max-model-len 256"):
            connect(folder, [server])
        with pytest.raises(AgileError, match=r"temperature 0.7. Start it with --logprobs-mode processed_logprobs"):
            connect(folder, [server], temperature=0.7, max_model_len=128)
        policy = connect(folder, [server], max_model_len=128)
        with pytest.raises(AgileError, match=r"refuses /collective_rpc \(HTTP 404.*agile vllm-server"):
            policy.update_weights(weights(lm), 1)
    finally:
        server.kill()
