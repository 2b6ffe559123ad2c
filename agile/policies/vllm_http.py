"""vLLM servers: how they are started, what is known of each, what they are asked and what their answers mean."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import torch

from agile.errors import AgileError
from agile.types import Completion, Usage

REMEDY = "Start servers with `agile vllm-server` (docs/vllm.md)."


def saved_dtype(model: str | Path) -> str:
    """The dtype that a model folder was saved in.

    Raises:
        AgileError: It is no model folder.
    """
    try:
        config = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise AgileError(f"{model} is no model folder ({error}). Give one such as RUN/sft of `agile train`.") from None
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def server_command(
    model: str | Path,
    port: int,
    *,
    host: str = "127.0.0.1",
    python: str = sys.executable,
    name: str = "agile",
    dtype: str = "bfloat16",
    max_model_len: int | None = None,
    max_num_seqs: int = 256,
    kv_cache_gib: float | None = None,
    enforce_eager: bool = False,
    block_size: int | None = None,
) -> list[str]:
    """The command that starts a server such as `VLLMServerPolicy` expects.

    The server obeys everyone who reaches its port (that is how it takes over weights): a host other than the default
    belongs on a trusted network only.

    Args:
        model: A folder in Hugging Face format on the server's machine.
        python: The interpreter of the environment that vLLM is installed in.
        kv_cache_gib: Size of the KV cache; by default what vLLM finds free. Name it on a CPU.
        enforce_eager: Compile nothing: an earlier start, slower steps on a GPU.

    >>> print(*server_command("runs/mine/sft", 8000, python="python")[:5])
    env VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server
    """
    cpu = not torch.cuda.is_available()
    optional = {
        "--max-model-len": max_model_len,
        "--block-size": block_size,
        "--kv-cache-memory-bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
    }
    return [
        *("env", "VLLM_SERVER_DEV_MODE=1", python, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", name, "--host", host, "--port", str(port)),
        *("--dtype", dtype, "--max-num-seqs", str(max_num_seqs)),
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
        *("--skip-tokenizer-init", "--enable-scale-out", "--enable-prefix-caching", "--enable-prompt-tokens-details"),
        *(["--enforce-eager"] if enforce_eager else []),
        # as `serving.unchunked`: vLLM on a CPU cannot sample with a seed behind a part of a prompt
        *(
            ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(8192, max_model_len or 0))]
            if cpu
            else []
        ),
        *(str(part) for pair in optional.items() if pair[1] is not None for part in pair),
    ]


def request_body(name: str, prompt_ids: Sequence[int], **sampling: Any) -> dict[str, Any]:
    """A request to sample from the model of this name, by default at temperature 1."""
    # everything that a server could have a default of its own for is named
    fixed = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "logprobs": 0}
    penalties = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "watermarking": False, "detokenize": False}
    return {
        "model": name,
        "token_ids": list(prompt_ids),
        "sampling_params": {**fixed, **penalties, "temperature": 1.0, **sampling},
    }


@dataclass(slots=True, eq=False)
class Server:
    """What is known of a server."""

    url: str
    up: bool = True
    active: int = 0
    failures: int = 0  # since it last answered; requests under way at the same time count once
    failed_at: float = 0.0  # when the last of them was counted
    next_try: float = 0.0  # of a server that is down
    last_error: str = ""
    revival: asyncio.Task[None] | None = None
    compared: bool = False  # with the model folder, whose weights it has to have until others are pushed
    comparison: asyncio.Task[None] | None = None
    push: threading.Lock = field(default_factory=threading.Lock)  # held while it is given weights


@dataclass(frozen=True, slots=True)
class Pushed:
    """The weights that every server must hold."""

    folder: Path
    label: str
    expected: list[float] | None


class Failed(Exception):
    """A server did not answer as it should; another one, or a later try, may."""

    def __init__(self, reason: str, *, gone: bool = False, silent: bool = False):
        super().__init__(reason)
        self.gone = gone  # no use to ask it again at once
        self.silent = silent  # nothing came back: it may be busy or dead

    @classmethod
    def of(cls, error: httpx2.RequestError) -> Failed:
        """A request that brought no answer."""
        return cls(f"{type(error).__name__}: {error}", gone=isinstance(error, httpx2.ConnectError), silent=True)


class LoadFailed(Failed):
    """A server did not load the weights that it was told to."""


class Busy(Exception):
    """A server asks for patience, of so many seconds if it says so."""

    def __init__(self, after_s: float | None):
        super().__init__("HTTP 429: too many requests")
        self.after_s = after_s


@contextmanager
def reading() -> Iterator[None]:
    """Around code that takes an answer apart.

    Raises:
        Failed: It is built otherwise.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise Failed(f"an answer that is none of vLLM 0.32's ({type(error).__name__}: {error})") from None


def patience(timeout_s: float) -> httpx2.Timeout:
    """For an answer; a connection comes soon or not at all."""
    return httpx2.Timeout(timeout_s, connect=min(30.0, timeout_s))


def read_answer(response: httpx2.Response) -> Any:
    """The JSON of a server's answer.

    Raises:
        AgileError: The server refuses what no repetition would change.
        Failed, Busy: Another try may do better.
    """
    status, text = response.status_code, " ".join(response.text.split())[:300]
    url = response.request.url
    server, path = f"{url.scheme}://{url.netloc.decode()}", url.path
    if status == 429:
        after = response.headers.get("Retry-After", "")
        raise Busy(float(after) if after.isdigit() else None)
    if status >= 500:
        if path.endswith("/collective_rpc"):
            raise LoadFailed(
                f"{server} could not load the weights (HTTP {status}: {text}). It must see vllm.weights_dir under the "
                "same path: choose a folder on a shared file system."
            )
        raise Failed(f"HTTP {status}: {text}")
    if status >= 400:
        reason = "" if status == 400 else REMEDY
        raise AgileError(f"{server} refuses {path} (HTTP {status}: {text}). {reason}".rstrip())
    try:
        return response.json()
    except ValueError:
        raise Failed(f"no JSON but {text[:80]!r}") from None


def read_completion(response: httpx2.Response, version: int) -> tuple[Completion, set[str]]:
    """A completion under weights of this version, and what the server calls its weights.

    Raises:
        AgileError: The server refuses what no repetition would change.
        Failed, Busy: Another try may do better.
    """
    answer = read_answer(response)
    with reading():
        (choice,) = answer["choices"]
        ids = tuple(int(i) for i in choice["token_ids"])
        logprobs = tuple(min(float(row["logprob"]), 0.0) for row in choice["logprobs"]["content"])
        labels = {str(span["version"]) for span in choice["weight_versions"]}
        usage = answer["usage"]
        cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0
        spent = Usage(usage["prompt_tokens"], cached, len(ids))
        if choice["finish_reason"] not in ("stop", "length"):
            raise ValueError(f"finish_reason {choice['finish_reason']!r}")
        return Completion(ids, logprobs, choice["finish_reason"], version, spent), labels
