"""`agile grade serve`: the hosted API's grader endpoints, asked by its own client."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from agile.policies.endpoint import Endpoint
from agile.tasks.graders.http import MAX_BODY_BYTES, PATH, graders_app
from tests.graders.serving import serving
from tests.machine import free_port
from tests.stub_endpoint import said, stub_endpoint
from tests.tiny import agile

CHECK: Any = {"type": "string_check", "name": "same", "input": "{{ sample.output_text }}",
              "reference": "{{ item.answer }}", "operation": "eq"}  # fmt: skip
PYTHON: Any = {
    "type": "python",
    "name": "p",
    "source": "def grade(sample, item):\n    return len(sample['output_text'])",
}
JUDGE: Any = {"type": "score_model", "name": "j", "model": "m", "input": [{"role": "user", "content": "Rate."}]}
FUNCTION: Any = {"type": "function", "name": "f", "function": "os.getcwd"}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with stub_endpoint() as stub:
        stub.reply = lambda body: said("0.25")
        app = graders_app(lambda: Endpoint(stub.url, "", api_key_env=None))
        with serving(app) as address:
            yield address


@pytest.fixture(scope="module")
def graders(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0).fine_tuning.alpha.graders


def test_the_client_runs_graders(graders: Any) -> None:
    assert graders.run(grader=CHECK, model_sample="blue", item={"answer": "blue"}).reward == 1.0
    assert graders.run(grader=PYTHON, model_sample="blue").reward == 4.0
    judged = graders.run(grader=JUDGE, model_sample="blue")
    assert (judged.reward, judged.metadata.token_usage, judged.metadata.sampled_model_name) == (0.25, 110, "m")
    multi = {"type": "multi", "name": "m", "graders": {"a": CHECK, "b": PYTHON}, "calculate_output": "a + b / 8"}
    both = graders.run(grader=multi, model_sample="blue", item={"answer": "red"})
    assert (both.reward, both.sub_rewards) == (0.5, {"a": 0.0, "b": 4.0})


def test_errors_of_grading_are_booleans(graders: Any) -> None:
    found = graders.run(grader=CHECK, model_sample="blue", item={})
    assert (found.reward, found.metadata.errors.invalid_variable_error) == (0.0, True)


def test_the_client_validates_graders(graders: Any) -> None:
    assert graders.validate(grader=CHECK).grader.operation == "eq"
    with pytest.raises(openai.BadRequestError, match=r"operation is .*is") as caught:
        graders.validate(grader=CHECK | {"operation": "is"})
    assert (caught.value.param, caught.value.type) == ("grader", "invalid_request_error")


def test_an_asynchronous_client_runs_many_at_once(address: str) -> None:
    import asyncio

    async def run() -> list[float]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            asked = client.fine_tuning.alpha.graders
            texts = ["x" * n for n in range(1, 9)]
            found = await asyncio.gather(*(asked.run(grader=PYTHON, model_sample=text) for text in texts))
        return [one.reward for one in found]

    assert asyncio.run(run()) == list(range(1, 9))


@pytest.mark.parametrize(
    "grader",
    [FUNCTION, {"type": "multi", "name": "m", "graders": {"f": FUNCTION}, "calculate_output": "f"}],
)
def test_functions_of_this_process_are_out_of_reach(graders: Any, grader: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="function graders are not run over HTTP"):
        graders.run(grader=grader, model_sample="x")
    with pytest.raises(openai.BadRequestError, match="function graders are not run over HTTP"):
        graders.validate(grader=grader)


@pytest.mark.parametrize(
    ("body", "status", "said_"),
    [
        (b"{", 400, "is no JSON"),
        (b"\xff", 400, "can't decode"),
        (b"[]", 400, "expected an object with grader, model_sample, item"),
        (b'{"grader": 3, "model_sample": "x"}', 400, "grader is 3: expected an object with type"),
        (b'{"model_sample": "x"}', 400, "grader is null"),
        ({"grader": CHECK}, 400, "model_sample: expected the text"),
        ({"grader": CHECK, "model_sample": ["x"]}, 400, "model_sample: expected the text"),
        ({"grader": CHECK, "model_sample": "x", "item": 3}, 400, "item: expected an object"),
        ({"grader": CHECK, "model_sample": "x", "reference_answer": "y"}, 400, "'reference_answer' is unknown; what"),
        (b" " * (MAX_BODY_BYTES + 1), 413, "The body has more than"),
    ],
)
def test_bad_requests(address: str, body: Any, status: int, said_: str) -> None:
    sent: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = httpx2.post(f"{address}{PATH}/run", headers={"content-type": "application/json"}, **sent)
    assert answer.status_code == status
    assert said_ in answer.json()["error"]["message"]


def test_web_pages_and_other_paths_are_refused(address: str) -> None:
    plain = httpx2.post(f"{address}{PATH}/run", content=b"{}", headers={"content-type": "text/plain"})
    assert (plain.status_code, plain.json()["error"]["message"]) == (
        415,
        "The content type is text/plain, expected application/json.",
    )
    renamed = httpx2.post(f"{address}{PATH}/run", json={"grader": CHECK}, headers={"host": "evil.example"})
    assert renamed.status_code == 400
    elsewhere = httpx2.get(f"{address}/v1/models")
    assert elsewhere.status_code == 404
    assert "POST /v1/fine_tuning/alpha/graders/run" in elsewhere.json()["error"]["message"]
    assert httpx2.get(f"{address}{PATH}/run").status_code == 405


def test_a_missing_key_is_the_server_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.testclient import TestClient

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    app = graders_app(lambda: Endpoint("http://127.0.0.1:9/v1", "", section="the endpoint's settings"))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        answer = client.post(f"{PATH}/run", json={"grader": JUDGE, "model_sample": "x"})
    assert answer.status_code == 500
    assert "OPENAI_API_KEY" in answer.json()["error"]["message"]


def test_the_command_serves_until_it_is_stopped() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = agile("grade", "serve", "--port", str(port))
    assert refused.exit_code == 2
    assert re.search(rf"Cannot listen on 127.0.0.1:{port}: .*Choose another --port", refused.output)
    port = free_port()
    command = [sys.executable, "-m", "agile.cli", "grade", "serve", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ, text=True) as served:
        try:
            assert served.stdout is not None
            assert f"http://127.0.0.1:{port}/v1" in served.stdout.readline()
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            assert client.fine_tuning.alpha.graders.run(grader=PYTHON, model_sample="blue").reward == 4.0
        finally:
            served.terminate()
    assert served.returncode is not None
