"""LoRA by peft: small matrices that learn beside frozen weights, and the plain weights that both amount to.

An adapted model stays the object that it was, of its own class: peft replaces linear layers inside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from agile.errors import AgileError

ADAPTER = "default"  # peft's name for the only adapter of a model


def add_adapter(
    lm: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] = ("all-linear",),
    token_ids: Sequence[int] = (),
) -> None:
    """Freeze a model and put an adapter into it that changes nothing yet.

    Args:
        lm: Changed in place.
        rank: Of the product B A that is added to each weight.
        alpha: The product is scaled by `alpha / rank`.
        target_modules: Names, or ends of names, of the linear layers to adapt; `all-linear` for all but the output
            embedding.
        token_ids: Rows of the input and output embeddings that learn too: tokens that the model was never trained on.

    Raises:
        AgileError: A target matches no linear layer.
    """
    head = lm.get_output_embeddings()
    linear = [name for name, m in lm.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    kinds = sorted({name.rpartition(".")[2] for name in linear})
    wanted = kinds if list(target_modules) == ["all-linear"] else list(target_modules)
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in linear):  # as peft matches them
            raise AgileError(
                f"lora.target_modules names {target!r}, which matches no linear layer of {type(lm).__name__}. It has "
                f"{', '.join(kinds)}; take some of these, or [all-linear]. (The embeddings take no adapter; the rows "
                "of new action tokens learn anyway.)"
            )

    from peft import LoraConfig, inject_adapter_in_model

    embeddings = (lm.get_input_embeddings(), lm.get_output_embeddings())
    names_of_embeddings = [name for name, m in lm.named_modules() if any(m is e for e in embeddings)]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=lm.name_or_path or None,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it, whatever it is
        lora_dropout=0.0,  # anything else would make the ratio to the old policy differ from 1 before any update
        target_modules=wanted,
        trainable_token_indices={name: sorted(token_ids) for name in names_of_embeddings} if token_ids else None,
    )
    inject_adapter_in_model(config, lm, ADAPTER)
    lm.eval()


def is_adapted(lm: nn.Module) -> bool:
    return hasattr(lm, "peft_config")


@contextmanager
def adapter_off(lm: nn.Module) -> Iterator[None]:
    """Within it the model is the one that it was before `add_adapter`."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [m for m in lm.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    trained = {p: p.requires_grad for p in lm.parameters()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, learns in trained.items():  # peft has just thawed all of the adapter
            parameter.requires_grad_(learns)


def plain_parameters(
    lm: nn.Module,
) -> Iterator[tuple[str, list[nn.Parameter], Callable[[], Tensor]]]:
    """Every parameter of a model by the name that it has without an adapter, tied ones under each of their names.

    Returns:
        Name, the parameters that it is made of (to be gathered first where they are sharded), and a function that gives
        its value: W + alpha / rank * B A of an adapted layer, and the learned rows in their places.
    """
    adapted = {
        name: m for name, m in lm.named_modules(remove_duplicate=False) if "base_layer" in m._modules
    }  # peft's layers, told without its import, which takes seconds
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        owner = next((o for o in adapted if name.startswith(f"{o}.")), None)
        if owner is None:
            yield name, [parameter], parameter.detach
            continue
        leaf = name.removeprefix(f"{owner}.")
        if leaf.startswith("base_layer."):
            layer, leaf = adapted[owner], leaf.removeprefix("base_layer.")
            plain = f"{owner.removesuffix('.token_adapter')}.{leaf}"
            if leaf == "weight":
                yield plain, [parameter, *_adapter_parameters(layer)], _Merged(layer, parameter)
            else:
                yield plain, [parameter], parameter.detach


def _adapter_parameters(layer: nn.Module) -> list[nn.Parameter]:
    base = {id(p) for p in layer.get_submodule("base_layer").parameters()}
    return [p for p in layer.parameters() if id(p) not in base]


class _Merged:
    """The weight that an adapted layer amounts to, as a new tensor."""

    def __init__(self, layer: Any, weight: nn.Parameter):
        self.layer, self.weight = layer, weight

    @torch.no_grad()
    def __call__(self) -> Tensor:
        if hasattr(self.layer, "trainable_tokens_delta"):
            rows: Tensor = self.layer.get_merged_weights([ADAPTER])
            return rows.detach()
        change = self.layer.get_delta_weight(ADAPTER)
        merged: Tensor = self.weight.float() + change.float()  # one rounding, not two
        return merged.to(self.weight.dtype)


def adapter_weights(lm: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the adapter, by their names in the adapted model."""
    layers = [name for name, m in lm.named_modules() if "base_layer" in m._modules]
    for name, parameter in lm.named_parameters():
        if any(name.startswith(f"{layer}.") for layer in layers) and ".base_layer." not in name:
            yield name, parameter


def adapter_config(lm: PreTrainedModel, base: str) -> dict[str, Any]:
    """What peft writes beside an adapter; `base` is the folder or name of the model that it belongs to."""
    config: Any = lm.peft_config[ADAPTER]
    found = {**config.to_dict(), "base_model_name_or_path": base, "inference_mode": True}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in found.items()}


def save_adapter(folder: Path, config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]]) -> None:
    """Write an adapter as peft saves it; `PeftModel.from_pretrained(model, folder)` reads it.

    Args:
        config: As `adapter_config` gives it.
        weights: All of `adapter_weights`, whole.
    """
    saved = {
        f"base_model.model.{name}".replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}"): tensor.detach().cpu()
        for name, tensor in weights
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in saved.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
