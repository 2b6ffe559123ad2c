"""What a stage has trained, as folders that transformers, vLLM and peft load as they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from agile import ranks
from agile.engine import Engine
from agile.lora import adapter_config, save_adapter


@dataclass(frozen=True, slots=True)
class Trained:
    """A model's weights, whole and in the memory of the CPU.

    Attributes:
        lm: The model in training, maybe sharded; only its config and names are read.
        weights: By their plain names, an adapter merged; empty on all processes but the first.
        adapter: The adapter's own, by their names in `lm`; empty without one.
        base: The folder or name of the model that the adapter belongs to.
    """

    lm: PreTrainedModel
    weights: dict[str, Tensor]
    adapter: dict[str, Tensor]
    base: str

    @classmethod
    def gather(cls, engine: Engine, base: str) -> Trained:
        """From an engine whose module has the model as `lm`. All processes must call it."""
        lm = engine.module.lm
        first = ranks.is_main()
        # tied weights are saved once, under the name that transformers loads
        copies = set(getattr(lm, "all_tied_weights_keys", None) or ())
        weights, adapter = {}, {}
        for name, tensor in engine.weights():
            if first and name not in copies:
                weights[name] = tensor.to("cpu", copy=True)
        for name, tensor in engine.adapter_weights():
            if first:
                adapter[name] = tensor.to("cpu", copy=True)
        return cls(lm, weights | _buffers(lm), adapter, base)

    def save_pretrained(self, folder: Path) -> None:
        """Write the model with its adapter merged, and the adapter alone to `<folder>/adapter`."""
        self.lm.save_pretrained(folder, state_dict=dict(self.weights))
        if self.adapter:
            save_adapter(folder / "adapter", adapter_config(self.lm, self.base), self.adapter.items())


def _buffers(lm: PreTrainedModel) -> dict[str, Tensor]:
    """Buffers that are saved; an adapter's are not."""
    found = {}
    for prefix, module in lm.named_modules():
        if "base_layer" in module._modules or ".token_adapter" in prefix:
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}".removeprefix(".")] = buffer.detach().cpu()
    return found
