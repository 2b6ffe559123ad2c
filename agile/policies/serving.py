"""What both vLLM policies share: requests must fit the model, and weights must all be there and arrive."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as hf_logging

from agile.errors import AgileError

# How far log-probabilities may lie apart, on average, when vLLM and transformers hold the same weights.
TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.2}
MAX_SHARD_BYTES = 4 << 30


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the progress bars of transformers."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model folder, and what it takes.

    Attributes:
        folder: In Hugging Face format.
        max_model_len: Most tokens of prompt and completion together.
        shapes: Of every parameter by its Hugging Face name, tied ones included.
        architecture: Its class in transformers.
    """

    folder: Path
    config: PretrainedConfig
    max_model_len: int
    shapes: Mapping[str, torch.Size]
    architecture: Any

    @classmethod
    def read(cls, folder: str | Path, *, max_model_len: int | None, num_tokens: int | None) -> ServedModel:
        """Read the folder's config; `num_tokens` is the length of the tokenizer, None for not to check it.

        Raises:
            AgileError: It holds no causal language model, a smaller vocabulary, or one of shorter context.
        """
        try:
            config = AutoConfig.from_pretrained(folder)
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(config)
        except (OSError, ValueError) as error:
            raise AgileError(f"{folder} holds no causal language model in Hugging Face format: {error}") from None
        text = config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None)
        if max_model_len is not None and longest is not None and max_model_len > longest:
            raise AgileError(
                f"A context of {max_model_len} tokens is wanted, but the model in {folder} knows {longest} positions. "
                "Lower rollout.max_context_tokens, or choose a model of longer context."
            )
        if num_tokens is not None and num_tokens > text.vocab_size:
            raise AgileError(
                f"The tokenizer has {num_tokens} tokens, the model in {folder} has {text.vocab_size}. Save the model "
                "after its embeddings were resized (`load_lm` does that), or pass the tokenizer that belongs to it."
            )
        shapes = {name: p.shape for name, p in skeleton.named_parameters(remove_duplicate=False)}
        return cls(Path(folder), config, max_model_len or longest or 2048, shapes, type(skeleton))

    @property
    def vocab_size(self) -> int:
        size: int = self.config.get_text_config().vocab_size
        return size

    @property
    def probe(self) -> list[int]:
        """A prompt that touches as much of the vocabulary as a short one can."""
        length = min(32, self.max_model_len - 2)
        return [(i * self.vocab_size) // length for i in range(length)]

    def check_request(self, prompt_ids: Sequence[int], max_tokens: int) -> None:
        """Refuse what vLLM would answer with a crash or a silently shortened completion.

        Raises:
            AgileError: The prompt is empty, too long for `max_tokens` more, or of another tokenizer.
        """
        if not prompt_ids or max_tokens < 1:
            raise AgileError(
                f"A request of {len(prompt_ids)} prompt tokens and max_tokens={max_tokens}: vLLM continues a prompt "
                "of at least one token by at least one."
            )
        if len(prompt_ids) + max_tokens > self.max_model_len:
            raise AgileError(
                f"A prompt of {len(prompt_ids)} tokens and max_tokens={max_tokens} do not fit max_model_len="
                f"{self.max_model_len}. Raise rollout.max_context_tokens."
            )
        low, high = min(prompt_ids), max(prompt_ids)
        if low < 0 or high >= self.vocab_size:
            raise AgileError(
                f"Token id {low if low < 0 else high} is none of the {self.vocab_size} of the model in {self.folder}. "
                "Use the tokenizer that the model was saved with."
            )

    def all_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass the weights through, copied to the CPU.

        vLLM keeps tensors until their layer is complete, longer than the givers of weights may.

        Raises:
            AgileError: One is missing, unknown, twice there or of another shape. vLLM would go on with a stale one: a
                tied `lm_head.weight` that is not given stays as it was.
        """
        missing = dict(self.shapes)
        for name, tensor in weights:
            expected = missing.pop(name, None)
            if expected is None:
                what = "comes twice" if name in self.shapes else f"is none of {self.folder}"
                raise AgileError(f"Weight {name} {what}. Give every parameter of the Hugging Face model once.")
            if tensor.shape != expected:
                raise AgileError(
                    f"Weight {name} is of shape {tuple(tensor.shape)}, but {tuple(expected)} in {self.folder}. The "
                    "trainer's model must have grown: start vLLM from a folder that it was saved to."
                )
            yield name, tensor.detach().to("cpu", copy=True)
        if missing:
            raise AgileError(
                f"{len(missing)} of {len(self.shapes)} weights are missing, among them {sorted(missing)[:3]}. Give "
                "every parameter, tied ones too (`named_parameters(remove_duplicate=False)`)."
            )

    def write(self, weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
        """Write the weights as a model folder, which is there when it is complete and not before.

        Raises:
            AgileError: Weights are missing or wrong, or the disk does not take them.
        """
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir(parents=True)
            shard: dict[str, Tensor] = {}
            files: dict[str, str] = {}
            for name, tensor in self.all_weights(weights):
                shard[name] = tensor
                if sum(t.nbytes for t in shard.values()) > MAX_SHARD_BYTES:
                    _write_shard(shard, part, files)
            _write_shard(shard, part, files)
            index = {"metadata": {}, "weight_map": files}
            (part / "model.safetensors.index.json").write_text(json.dumps(index))
            self.config.save_pretrained(part)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
        except (OSError, SafetensorError) as error:
            raise AgileError(f"The weights cannot be written to {folder} ({error}). Free space there.") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def written_logprobs(self, folder: Path) -> list[float]:
        """`expected_logprobs` of weights that `write` wrote."""
        weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        return self.expected_logprobs(weights)

    def folder_logprobs(self) -> list[float]:
        """`expected_logprobs` of the weights in the folder."""
        with quiet_loading():
            return self._logprobs(self.architecture.from_pretrained(self.folder, dtype="auto"))

    def adapted_logprobs(self, adapter: Path) -> list[float]:
        """`expected_logprobs` of the weights in the folder with an adapter that `save_adapter` wrote."""
        from peft import PeftModel

        with quiet_loading():
            base = self.architecture.from_pretrained(self.folder, dtype="auto")
            return self._logprobs(PeftModel.from_pretrained(base, adapter))

    def expected_logprobs(self, weights: dict[str, Tensor]) -> list[float]:
        """What transformers says of each token of `probe` but the first, under these weights, on the CPU."""
        dtype = next(iter(weights.values())).dtype
        with quiet_loading():
            return self._logprobs(
                self.architecture.from_pretrained(None, config=self.config, state_dict=weights, dtype=dtype)
            )

    @torch.no_grad()
    def _logprobs(self, lm: Any) -> list[float]:
        ids = torch.tensor([self.probe])
        logits = lm.eval()(input_ids=ids).logits[0, :-1].float()
        found: list[float] = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1).tolist()
        return found


def _write_shard(shard: dict[str, Tensor], folder: Path, files: dict[str, str]) -> None:
    name = f"model-{len(set(files.values())):05}.safetensors"
    save_file(shard, folder / name, metadata={"format": "pt"})
    files |= dict.fromkeys(shard, name)
    shard.clear()


def mean_difference(found: Collection[float], expected: Collection[float]) -> float:
    return sum(abs(a - b) for a, b in zip(found, expected, strict=True)) / len(expected)


def not_taken_over(engine: str, reason: str) -> AgileError:
    return AgileError(
        f"{engine} did not take over the weights it was given: {reason}. Start it anew from a saved model; if that "
        "does not help, this vLLM does not reload this architecture."
    )


def check_logprobs(found: Collection[float], expected: Collection[float], dtype: str, engine: str) -> None:
    """Refuse an engine whose log-probabilities are not those of the weights it was given.

    Raises:
        AgileError: They differ by more than rounding does.
    """
    difference = mean_difference(found, expected)
    if not difference <= TOLERANCE[dtype]:
        raise not_taken_over(
            engine,
            f"its log-probabilities of {len(expected)} tokens are off by {difference:.3g} on average, "
            f"{TOLERANCE[dtype]:g} is what {dtype} explains",
        )


def unchunked(max_model_len: int) -> dict[str, Any]:
    """Engine arguments that keep prompts whole on a CPU.

    There vLLM 0.32 cannot sample with a seed behind a part of a prompt ("CPU Generator does not use offset").
    """
    if torch.cuda.is_available():
        return {}
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, max_model_len)}


def dtype_name(dtype: Any) -> str:
    """`torch.float32`, `"float32"` or `"auto"` as vLLM resolved it."""
    return str(dtype).removeprefix("torch.")
