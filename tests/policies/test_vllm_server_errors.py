"""What the client does when servers are busy, fail, talk nonsense, hang or are gone: against a stub, without vLLM."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from agile.errors import AgileError
from agile.policies.serving import ServedModel
from agile.policies.vllm_http import server_command
from agile.policies.vllm_server import VLLMServerPolicy
from agile.types import Completion, Usage
from tests.machine import free_port
from tests.policies.contract import CODEC
from tests.policies.rollout_engines import make_model, save, weights

VOCABULARY = len(CODEC.tokenizer)
GENERATE = "/inference/v1/generate"
Reply = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM 0.32 does, unless its server has something else lined up."""

    server: Stub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            return self.send({}, 200 if self.server.healthy else 503)
        answers: dict[str, Any] = {
            "/v1/models": self.server.models or {"data": [{"id": self.server.name, "max_model_len": 256}]},
            "/weight_info": {"weight_version": self.server.label},
        }
        self.send(answers[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        self.server.requests.append((self.path, body))
        if self.path == GENERATE:
            self.generate(body)
        elif self.path == "/collective_rpc" and self.server.load_faults:
            self.server.load_faults.popleft()(self)
        elif not self.server.dev_mode:
            self.send({"detail": "Not Found"}, 404)
        else:
            self.server.label = body.get("new_version", self.server.label)
            self.send({"success": True, "results": [None]})

    def generate(self, body: dict[str, Any], *, faulty: bool = True) -> None:
        sampling = body["sampling_params"]
        if faulty and sampling["max_tokens"] > 1 and self.server.faults:
            return self.server.faults.popleft()(self)
        if any(int(i) >= VOCABULARY for i in sampling.get("logit_bias", {})):
            return self.send({"error": {"message": "out-of-vocab"}}, 400)
        logprob = -0.5 / (sampling["temperature"] if self.server.processed else 1.0)
        ids = [sampling.get("seed", 0) % VOCABULARY] * sampling["max_tokens"]
        row = {"logprob": logprob, "top_logprobs": [{"token_id": 0, "logprob": logprob}]}
        choice = {
            "token_ids": ids,
            "finish_reason": "length",
            "logprobs": {"content": [row] * len(ids)},
            "weight_versions": [{"version": self.server.label, "start": 0, "end": len(ids)}],
        }
        prompt = zip(body["token_ids"][1:], self.server.logprobs, strict=False)
        rows = [None, *({str(i): {"logprob": logprob}} for i, logprob in prompt)]
        usage = {"prompt_tokens": len(body["token_ids"]), "prompt_tokens_details": {"cached_tokens": 1}}
        self.send({"choices": [choice], "usage": usage, "prompt_logprobs": rows})

    def send(self, answer: Any, status: int = 200, **headers: str) -> None:
        text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text)


class Stub(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.name, self.label, self.processed, self.dev_mode, self.healthy = "agile", "default", True, True, True
        self.faults: deque[Reply] = deque()
        self.load_faults: deque[Reply] = deque()
        self.models: Any = None
        self.logprobs: list[float] = []  # of a prompt's tokens but the first
        self.requests: list[tuple[str, Any]] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


@pytest.fixture
def stubs() -> Iterator[list[Stub]]:
    two = [Stub(free_port()), Stub(free_port())]  # nobody takes one whose server has stopped
    yield two
    for stub in two:
        stub.stop()


@pytest.fixture(scope="module")
def lm() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture(scope="module")
def folder(lm: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(lm, tmp_path_factory.mktemp("model") / "lm")


def connect(folder: Path, *stubs: Stub, **arguments: Any) -> VLLMServerPolicy:
    arguments = {"timeout_s": 20.0, "retry_s": 0.1, "verify": False, **arguments}
    return VLLMServerPolicy(folder, [s.url for s in stubs], **arguments)


def ask(policy: VLLMServerPolicy, seeds: range = range(1)) -> list[Completion]:
    async def together() -> list[Completion]:
        calls = (policy.complete([7, 8], max_tokens=3, stop={1}, seed=s) for s in seeds)
        return await asyncio.gather(*calls)

    return asyncio.run(together())


def busy(handler: Handler) -> None:
    handler.send({}, 429, Retry_After="1")


def failing(handler: Handler) -> None:
    handler.send({"error": "worker died"}, 500)


def garbage(handler: Handler) -> None:
    handler.send(b"<html>bad gateway</html>")


def incomplete(handler: Handler) -> None:
    handler.send({"choices": [{"token_ids": [1, 2, 3], "finish_reason": "length"}]})


def aborted(handler: Handler) -> None:
    choice = {"token_ids": [], "finish_reason": "abort", "logprobs": {"content": []}, "weight_versions": []}
    handler.send({"choices": [choice], "usage": {"prompt_tokens": 2, "prompt_tokens_details": None}})


def hanging(handler: Handler) -> None:
    time.sleep(2.0)


def cut(handler: Handler) -> None:
    handler.close_connection = True


SOON_S = 20.0  # far below the limits that a request without one of its own has
HASTE_S = 0.5  # after which a request to a server that hangs is given up
EXPECTED = Completion((0, 0, 0), (-0.5, -0.5, -0.5), "length", 0, Usage(2, 1, 3))


@pytest.mark.parametrize("fault", [failing, garbage, incomplete, aborted, hanging, cut])
def test_a_failed_request_is_repeated(folder: Path, stubs: list[Stub], fault: Reply) -> None:
    stubs[0].faults.extend([fault] * 2)
    policy = connect(folder, stubs[0], request_timeout_s=HASTE_S if fault is hanging else None)
    assert ask(policy) == [EXPECTED]
    assert not stubs[0].faults


def test_a_busy_server_is_given_the_time_it_asks_for(folder: Path, stubs: list[Stub]) -> None:
    stubs[0].faults.append(busy)
    policy = connect(folder, stubs[0])
    started = time.monotonic()
    assert ask(policy) == [EXPECTED]
    assert time.monotonic() - started >= 1.0


def test_a_request_names_everything_that_a_server_could_have_a_default_for(folder: Path, stubs: list[Stub]) -> None:
    ask(connect(folder, stubs[0], temperature=0.7))
    path, body = stubs[0].requests[-1]
    assert path == GENERATE
    assert body == {
        "model": "agile",
        "token_ids": [7, 8],
        "sampling_params": {
            **{"temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "watermarking": False, "detokenize": False},
            **{"max_tokens": 3, "stop_token_ids": [1], "ignore_eos": True, "seed": 0, "logprobs": 0},
        },
    }


def test_requests_are_spread(folder: Path, stubs: list[Stub]) -> None:
    found = ask(connect(folder, *stubs), range(40))
    assert [c.token_ids[0] for c in found] == list(range(40))
    shares = [sum(body["sampling_params"]["max_tokens"] == 3 for _, body in s.requests) for s in stubs]
    assert sum(shares) == 40 and min(shares) >= 10


@pytest.mark.slow
def test_a_server_that_keeps_failing_is_left_out_and_comes_back(
    folder: Path, stubs: list[Stub], caplog: pytest.LogCaptureFixture
) -> None:
    policy = connect(folder, *stubs)
    stubs[0].faults.extend([failing] * 100)
    for count in (1, 2):
        assert len(ask(policy, range(12))) == 12
        assert policy._servers[0].failures == count and "left out" not in caplog.text
    assert len(ask(policy, range(12))) == 12
    assert f"{stubs[0].url} is left out (HTTP 500" in caplog.text
    stubs[0].faults.clear()
    until = time.monotonic() + 60
    while f"{stubs[0].url} is back." not in caplog.text:
        assert time.monotonic() < until
        ask(policy)
        time.sleep(0.02)


def test_no_server_left_is_an_error_with_address_reason_and_remedy(folder: Path, stubs: list[Stub]) -> None:
    policy = connect(folder, *stubs, timeout_s=1.0)
    for stub in stubs:
        stub.stop()
    started = time.monotonic()
    with pytest.raises(AgileError) as caught:
        ask(policy, range(5))
    assert time.monotonic() - started < SOON_S
    for part in (stubs[0].url, stubs[1].url, "ConnectError", "agile vllm-server"):
        assert part in str(caught.value)
    with pytest.raises(AgileError, match=rf"No vLLM server answered .*{stubs[0].url}: ConnectError"):
        connect(folder, *stubs)


def test_a_hanging_server_ends_the_run_in_time(folder: Path, stubs: list[Stub]) -> None:
    policy = connect(folder, stubs[0], timeout_s=1.5, request_timeout_s=HASTE_S)
    stubs[0].faults.extend([hanging] * 100)
    started = time.monotonic()
    with pytest.raises(AgileError, match="ReadTimeout"):
        ask(policy)
    assert time.monotonic() - started < SOON_S


@pytest.mark.slow
def test_a_busy_server_is_not_taken_for_dead(folder: Path, stubs: list[Stub], caplog: pytest.LogCaptureFixture) -> None:
    policy = connect(folder, stubs[0], request_timeout_s=HASTE_S)
    stubs[0].faults.extend([hanging] * 12)
    assert len(ask(policy, range(12))) == 12
    assert "left out" not in caplog.text
    stubs[1].healthy = False
    policy = connect(folder, *stubs, request_timeout_s=HASTE_S)
    stubs[1].faults.extend([hanging] * 100)
    assert len(ask(policy, range(12))) == 12
    assert f"{stubs[1].url} is left out (ReadTimeout" in caplog.text


@pytest.mark.slow
def test_requests_wait_for_room_without_being_given_up(folder: Path, stubs: list[Stub]) -> None:
    policy = connect(folder, *stubs, max_active=2, timeout_s=3.0)
    under_way = most = 0
    lock = threading.Lock()

    def slow(handler: Handler) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.4)
        with lock:
            under_way -= 1
        sampling = {"temperature": 1.0, "seed": 0, "max_tokens": 3}
        handler.generate({"token_ids": [7, 8], "sampling_params": sampling}, faulty=False)

    for stub in stubs:
        stub.faults.extend([slow] * 16)
    started = time.monotonic()
    assert len(ask(policy, range(32))) == 32
    assert most == 4 and time.monotonic() - started > policy.timeout_s
    assert not any(s.active for s in policy._servers)


def test_requests_that_wait_for_room_end_when_nothing_is_answered(folder: Path, stubs: list[Stub]) -> None:
    policy = connect(folder, stubs[0], max_active=1, timeout_s=0.8)
    stubs[0].faults.extend([hanging] * 100)

    async def together() -> list[Completion | BaseException]:
        calls = (policy.complete([7, 8], max_tokens=3, stop={1}, seed=s) for s in range(5))
        return await asyncio.gather(*calls, return_exceptions=True)

    started = time.monotonic()
    assert all("raise vllm.timeout_s" in str(error) for error in asyncio.run(together()))
    assert time.monotonic() - started < SOON_S


def test_a_restarted_server_gets_the_current_weights_before_it_is_used(
    folder: Path, stubs: list[Stub], lm: LlamaForCausalLM, tmp_path: Path
) -> None:
    policy = connect(folder, stubs[0], weights_dir=tmp_path)
    for version in (1, 2, 3):
        policy.update_weights(weights(lm), version)
    mine = stubs[0].label
    assert sorted(f.name for f in tmp_path.iterdir()) == [mine.replace("3-", "2-"), mine]
    stubs[0].label = "default"
    stubs[0].requests.clear()
    assert ask(policy)[0].policy_version == 3
    assert stubs[0].label == mine and mine.startswith("3-")
    reload = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / mine)}}
    assert ("/collective_rpc", reload) in stubs[0].requests
    stubs[0].label = "4-another"
    with pytest.raises(AgileError, match=rf"{stubs[0].url} holds the weights 4-another, expected {mine}: another run"):
        ask(policy)


@pytest.mark.parametrize("fault", [failing, hanging, cut])
def test_a_server_that_cannot_load_is_left_out(
    folder: Path, stubs: list[Stub], lm: LlamaForCausalLM, tmp_path: Path, fault: Reply
) -> None:
    policy = connect(folder, *stubs, weights_dir=tmp_path, retry_s=100.0)
    stubs[1].load_faults.append(fault)
    policy.update_weights(weights(lm), 1)
    assert [s.up for s in policy._servers] == [True, False]
    assert {c.policy_version for c in ask(policy, range(5))} == {1}


@pytest.mark.slow
def test_the_only_server_may_be_away_while_the_weights_change(
    folder: Path, stubs: list[Stub], lm: LlamaForCausalLM, tmp_path: Path
) -> None:
    policy = connect(folder, stubs[0], weights_dir=tmp_path)
    port = stubs[0].server_port
    stubs[0].stop()
    timer = threading.Timer(1.0, lambda: stubs.append(Stub(port)))
    timer.start()
    policy.update_weights(weights(lm), 1)
    assert stubs[-1].label.startswith("1-") and ask(policy)[0].policy_version == 1
    stubs[-1].load_faults.append(failing)
    policy.update_weights(weights(lm), 2)
    assert stubs[-1].label.startswith("2-")
    stubs[-1].load_faults.extend([failing] * 9)
    with pytest.raises(AgileError, match=rf"{stubs[0].url} could not load .*worker died.* vllm.weights_dir"):
        policy.update_weights(weights(lm), 3)


def test_a_server_with_other_weights_is_refused_unless_it_is_given_the_right_ones(
    folder: Path, stubs: list[Stub], lm: LlamaForCausalLM, tmp_path: Path
) -> None:
    tied = save(make_model(3, tied=True), tmp_path / "tied")
    for own in (folder, tied):
        stubs[0].logprobs = ServedModel.read(own, max_model_len=None, num_tokens=None).folder_logprobs()
        policy = connect(own, stubs[0], verify=True, dtype="float32")
        stubs[0].requests.clear()
        assert len(ask(policy, range(5))) == len(ask(policy, range(5))) == 5
        assert sum("prompt_logprobs" in body["sampling_params"] for _, body in stubs[0].requests) == 1
    policy = connect(folder, stubs[0], verify=True, dtype="float32", weights_dir=tmp_path / "weights")
    with pytest.raises(AgileError, match=rf"{stubs[0].url} serves other weights than {folder}: .* update_weights"):
        ask(policy, range(5))
    stubs[0].logprobs = policy.model.folder_logprobs()
    policy.update_weights(weights(lm), 1)
    assert len(ask(policy, range(5))) == 5


def test_a_server_that_hangs_does_not_delay_the_end(folder: Path, stubs: list[Stub]) -> None:
    policy = connect(folder, *stubs, retry_s=0.0)
    policy._take_out(policy._servers[1], ConnectionError("away"))
    stubs[1].shutdown()  # it accepts connections, but answers none
    started = time.monotonic()
    ask(policy)
    assert time.monotonic() - started < SOON_S


def test_runs_may_share_the_folder_of_weights(
    folder: Path, stubs: list[Stub], lm: LlamaForCausalLM, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    one, other = (connect(folder, s, weights_dir=tmp_path / "link") for s in stubs)
    for policy in (one, other):
        policy.update_weights(weights(lm), 1)
    assert sorted(f.name for f in (tmp_path / "there").iterdir()) == sorted(s.label for s in stubs)
    told = [body["kwargs"]["weights_path"] for path, body in stubs[0].requests if path == "/collective_rpc"]
    assert told == [str(tmp_path / "link" / stubs[0].label)]
    one.close()
    assert [f.name for f in (tmp_path / "there").iterdir()] == [stubs[1].label]


@pytest.mark.parametrize(
    "models", [[1], {"data": [{}]}, {"data": None}, {"data": [{"id": "agile", "max_model_len": "long"}]}]
)
def test_a_server_of_another_kind_is_refused(folder: Path, stubs: list[Stub], models: Any) -> None:
    stubs[0].models = models
    with pytest.raises(AgileError, match=rf"{stubs[0].url}: an answer that is none of vLLM 0.32's"):
        connect(folder, stubs[0])


def test_a_server_that_is_not_what_the_policy_needs_is_refused(
    folder: Path, stubs: list[Stub], lm: LlamaForCausalLM, tmp_path: Path
) -> None:
    stub = stubs[0]
    stub.name = "gpt"
    with pytest.raises(AgileError, match=rf"{stub.url} serves \['gpt'\], expected 'agile'"):
        connect(folder, stub)
    stub.name = "agile"
    for change, reason in ((-1, "vocabulary larger than the"), (1, "HTTP 400: .*out-of-vocab")):
        other = save(make_model(vocab_size=VOCABULARY + change), tmp_path / f"other{change}")
        with pytest.raises(AgileError, match=reason):
            connect(other, stub)
    stub.processed = False
    with pytest.raises(AgileError, match="--logprobs-mode processed_logprobs"):
        connect(folder, stub, temperature=0.7)
    stub.dev_mode = False
    with pytest.raises(AgileError, match=r"refuses /collective_rpc \(HTTP 404.*agile vllm-server"):
        connect(folder, stub, weights_dir=tmp_path / "weights").update_weights(weights(lm), 1)
    with pytest.raises(AgileError, match=r"set vllm.weights_dir"):
        connect(folder, stub).update_weights(weights(lm), 1)
    with pytest.raises(AgileError, match="needs the address of a server"):
        connect(folder)


def test_incomplete_weights_leave_no_folder(
    folder: Path, stubs: list[Stub], lm: LlamaForCausalLM, tmp_path: Path
) -> None:
    policy = connect(folder, stubs[0], weights_dir=tmp_path)
    with pytest.raises(AgileError, match=r"1 of 21 weights are missing, among them \['lm_head.weight'\]"):
        policy.update_weights(weights(lm, drop="lm_head.weight"), 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [False, True])
def test_written_weights_are_a_model_folder(folder: Path, tmp_path: Path, tied: bool) -> None:
    lm = make_model(3, tied=tied)
    model = ServedModel.read(save(lm, tmp_path / "lm"), max_model_len=None, num_tokens=None)
    model.write(weights(lm), tmp_path / "written")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "written")
    for name, tensor in lm.named_parameters(remove_duplicate=False):
        assert torch.equal(loaded.get_parameter(name), tensor)
    ids = torch.tensor([model.probe])
    with torch.no_grad():
        expected = lm(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert model.written_logprobs(tmp_path / "written") == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_command_starts_a_server_that_the_policy_accepts() -> None:
    command = " ".join(server_command("m", 8001, max_model_len=512, kv_cache_gib=1, enforce_eager=True))
    for part in (
        "VLLM_SERVER_DEV_MODE=1",
        "--logprobs-mode processed_logprobs",
        "--enable-scale-out",
        "--max-model-len 512",
        "--kv-cache-memory-bytes 1073741824",
        "--enforce-eager",
    ):
        assert part in command
