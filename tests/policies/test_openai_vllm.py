"""The prompted agent against vLLM's real server, with a model of random weights that says nonsense."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agile.bench import bench
from agile.config import RunConfig, load_config
from agile.errors import AgileError
from agile.model import small_llama
from agile.policies.endpoint import Endpoint
from tests.machine import free_port
from tests.worlds import make_codec

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
START_S = 900.0
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server of a tiny model."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_codec("bpe").tokenizer
    small_llama(tokenizer, num_layers=1, hidden_size=64, num_heads=2, max_tokens=8192, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat.jinja").write_text(TEMPLATE)
    port = free_port()
    words = ["--model", folder, "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--chat-template", folder / "chat.jinja", "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "8192", "--max-num-seqs", "8"]
    words += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "16384"]  # seeds need whole prompts on a CPU
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, words)],
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, "vLLM did not start in time"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


class Sent(Counter[str]):
    """Every request that goes out, by its body; from number `limit` on they are stopped."""

    limit = -1


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    monkeypatch.setattr("agile.bench.write_report", lambda report, out: None)
    monkeypatch.setattr("agile.bench.save_plots", lambda report, out: None)
    bodies = Sent()
    attempt = Endpoint._attempt

    async def counted(self: Endpoint, line: Any, body: Any) -> Any:
        if bodies.total() == bodies.limit:
            raise AgileError("stopped half way")
        bodies[json.dumps(body, sort_keys=True)] += 1
        return await attempt(self, line, body)

    monkeypatch.setattr(Endpoint, "_attempt", counted)
    return bodies


def config(server: str, tools: str) -> RunConfig:
    words = ["task.num_train_worlds=1", "task.num_test_worlds=2", "task.num_questions=3", "memory.encoder=hashing"]
    words += ["rollout.max_context_tokens=4000", "rollout.max_session_tokens=4000", "rollout.max_action_tokens=40"]
    words += ["evaluate.agents=[prompted]", "evaluate.baselines=[]", "evaluate.prompted.model=tiny"]
    words += [f"evaluate.prompted.base_url={server}", "evaluate.prompted.api_key_env=null"]
    return load_config(None, [*words, "evaluate.prompted.max_tokens=40", f"evaluate.prompted.tools={tools}"])


@pytest.mark.parametrize("tools", ["text", "auto"])
def test_a_bench_stopped_half_way_asks_nothing_twice(server: str, tmp_path: Path, sent: Sent, tools: str) -> None:
    sent.limit = 5
    with pytest.raises(AgileError, match="stopped half way"):
        bench(config(server, tools), tmp_path / "out")
    assert sent.total() == 5
    sent.limit = -1
    report = bench(config(server, tools), tmp_path / "out")
    agent, detail = report["agents"]["prompted"], report["details"]["prompted"]
    assert max(sent.values()) == 1 and sent.total() > 5
    assert detail["requests sent"] == sent.total() - 5
    assert agent["n"] == 6 and agent["usage"]["prompt_tokens"] > 0 and agent["usage"]["completion_tokens"] > 0
    bench(config(server, tools), tmp_path / "out")
    assert sent.total() == detail["requests sent"] + 5, "a finished one asks nothing"


def test_an_unknown_model_ends_it_at_once(server: str, tmp_path: Path, sent: Sent) -> None:
    changed = config(server, "text").model_copy(deep=True)
    prompted = changed.evaluate.prompted.model_copy(update={"model": "other"})
    evaluate = changed.evaluate.model_copy(update={"prompted": prompted})
    with pytest.raises(AgileError, match=r"evaluate\.prompted\.model"):
        bench(changed.model_copy(update={"evaluate": evaluate}), tmp_path / "out")
    assert sent.total() <= 2, "one request of each stream that was under way, and no retry"
