"""The memory of a forward and backward pass: the model's own code, run on tensors that have shapes but no values."""

from __future__ import annotations

import copy
import json
import weakref
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from agile.losses import entropy, token_logprobs

ATTENTION = "agile-plan"


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it the bytes of all tensors that come into being and still live are counted; `peak` is their maximum.

    Args:
        known: What is there already, and is not counted.
    """

    def __init__(self, *known: nn.Module):
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}
        for module in known:
            for tensor in (*module.parameters(), *module.buffers()):
                self._alive[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.count, result)
        return result

    def count(self, tensor: Tensor) -> None:
        """Take a tensor in that was there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._end, key)

    def _end(self, key: int) -> None:
        self.now -= self._alive.pop(key)


class _Flash(torch.autograd.Function):
    """What flash attention keeps: queries, keys, values, output, and one sum for each query; no (T, T) scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Any, None]:
    return _Flash.apply(query, key, value), None  # type: ignore[no-untyped-call]


AttentionInterface.register(ATTENTION, _attend)


def shaped(config: PretrainedConfig, num_layers: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a config, of its own class, on the meta device: no weights, no memory.

    Args:
        num_layers: In place of its own number.
    """
    config = copy.deepcopy(config)
    if num_layers is not None:
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    model.tie_weights()
    return model


def activation_bytes(
    config: PretrainedConfig,
    *,
    num_tokens: int,
    num_actions: int,
    dtype: torch.dtype,
    checkpointing: bool,
    separate_critic: bool,
    learning: bool,
) -> int:
    """Most bytes that one forward pass, and a backward pass where it is `learning`, holds beside the model's states.

    Measured on 2 and 3 layers; each further one adds what the third did.

    Args:
        num_tokens: Of the micro-batch, which has no padding.
        num_actions: Those of them for which there are logits.
    """
    text = config.get_text_config()
    key = (config.to_json_string(), num_tokens, num_actions, dtype, checkpointing, separate_critic, learning)
    layers = int(text.num_hidden_layers)
    if layers <= 3:
        return _peak(layers, *key)
    two, three = _peak(2, *key), _peak(3, *key)
    return two + (layers - 2) * (three - two)


@lru_cache
def _peak(
    num_layers: int,
    text: str,
    num_tokens: int,
    num_actions: int,
    dtype: torch.dtype,
    checkpointing: bool,
    separate_critic: bool,
    learning: bool,
) -> int:
    config = AutoConfig.for_model(**json.loads(text))
    lm = shaped(config, num_layers, dtype)
    if checkpointing:
        # the generators of random numbers are left alone: there is no dropout, and none on this device
        lm.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for layer in lm.base_model.modules():
        layer.training = checkpointing and isinstance(layer, GradientCheckpointingLayer)
    trunk = copy.deepcopy(lm.base_model) if separate_critic else None
    size = config.get_text_config().hidden_size
    head = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, 1)).to("meta")
    model = nn.ModuleList([lm, head] if trunk is None else [lm, head, trunk])
    for parameter in model.parameters():  # gradients that stay are states; here only one at a time is there
        parameter.register_post_accumulate_grad_hook(_forget)  # type: ignore[no-untyped-call]
    with torch.device("meta"):
        inputs: dict[str, Any] = {"input_ids": torch.zeros(1, num_tokens, dtype=torch.int64), "use_cache": False}
        inputs["attention_mask"] = torch.zeros(1, 1, 1, 1)  # any of four dimensions is taken as it is, and is not used
        action_ids = torch.zeros(num_actions, dtype=torch.int64)
    seen = Peak(model)
    with seen, torch.set_grad_enabled(learning):
        hidden = lm.base_model(**inputs).last_hidden_state[0]
        other = hidden.detach() if trunk is None else trunk(**inputs).last_hidden_state[0]
        logits = lm.get_output_embeddings()(hidden[:num_actions])
        logprobs, values = token_logprobs(logits, action_ids), head(other[:num_actions].float())
        if learning:
            with torch.no_grad():
                entropy(logits)
            (logprobs.sum() + values.sum()).backward()
    return seen.peak


def _forget(parameter: Tensor) -> None:
    parameter.grad = None
