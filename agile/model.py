"""The language model with a critic on its trunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from agile.attention import attend_by_plans, hidden_states, prepare_runs
from agile.batching import Batch
from agile.errors import AgileError


class _WideLinear(nn.Linear):
    """Computes in float32 or wider, whatever its weights are: values are regressed, and rounding would show."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return nn.functional.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class ActorCritic(nn.Module):
    """A causal LM, and a value head that reads the last hidden state of its trunk or of a trunk of the critic's own.

    The head does not send gradients into the trunk of the LM: a value loss there was seen to disturb what imitation had
    learned. A trunk of the critic's own, a copy of the LM's, learns from the value loss alone.

    Args:
        lm: Changed in place when trained.
        critic: `shared` or `separate`.

    Raises:
        AgileError: The LM's logits are not its output embedding applied to its last hidden state, or its attention is
            not the usual one.
    """

    def __init__(self, lm: PreTrainedModel, critic: str = "shared"):
        super().__init__()
        self.lm = lm.eval()  # dropout would make the ratio to the old policy differ from 1 before any update
        size = lm.config.get_text_config().hidden_size
        hidden, value = _WideLinear(size, size), _WideLinear(size, 1)
        nn.init.zeros_(value.weight)
        nn.init.zeros_(value.bias)
        self.value_head = nn.Sequential(hidden, nn.GELU(), value)
        head = lm.get_output_embeddings()
        probe = torch.arange(4, device=lm.device)[None]  # not one token alone: the padding token has no embedding
        # a thousandfold: the logits of an untrained model are too small for a cap to show
        with torch.no_grad(), head.register_forward_hook(lambda module, args, logits: 1e3 * logits):
            expected = lm(input_ids=probe).logits
            found = head(lm.base_model(input_ids=probe).last_hidden_state)
        if not torch.allclose(expected, found, rtol=1e-3, atol=1e-3):
            raise AgileError(
                f"{type(lm).__name__} does more to its last hidden state than its output embedding does (a cap or a "
                "scale on logits); such models cannot be trained here. Choose one like Llama, Qwen or Mistral."
            )
        prepare_runs(lm)
        self.critic_trunk = deepcopy(self.lm.base_model) if critic == "separate" else None
        for trunk in (lm, self.critic_trunk):
            if trunk is not None:
                attend_by_plans(trunk)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What the model says before each action token; logits are computed there and nowhere else.

        Returns:
            Logits (N, V) and values (N,) of the states before the batch's N action tokens, row by row; and the values
            (B,) of the states after each row's last token, in float32 or wider.
        """
        line = batch.input_ids, batch.position_ids, batch.plan
        hidden = hidden_states(self.lm.base_model, *line)  # (n, H)
        seen = hidden.detach() if self.critic_trunk is None else hidden_states(self.critic_trunk, *line)
        logits = self.lm.get_output_embeddings()(hidden.index_select(0, batch.before))
        values, last = (self.value_head(seen.index_select(0, i)).squeeze(-1) for i in (batch.before, batch.last))
        return logits, values, last

    def parameter_groups(self, value_lr: float) -> list[dict[str, Any]]:
        """What learns of the LM, and the critic's parameters with a learning rate of its own."""
        critic = [self.value_head] if self.critic_trunk is None else [self.value_head, self.critic_trunk]
        return [
            {"params": [p for p in self.lm.parameters() if p.requires_grad]},
            {"params": [p for module in critic for p in module.parameters()], "lr": value_lr},
        ]

    @contextmanager
    def policy_frozen(self) -> Iterator[None]:
        """Within it the critic alone learns: no gradient, no weight decay and no momentum moves the LM."""
        trained = [p for p in self.lm.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


def small_llama(
    tokenizer: PreTrainedTokenizerFast, *, num_layers: int, hidden_size: int, num_heads: int, max_tokens: int, seed: int
) -> LlamaForCausalLM:
    """A Llama with random weights for a tokenizer of one's own."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            max_position_embeddings=max_tokens,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
        )
    )


# Models pad their vocabulary to a round number; more rows than that without a token belong to another tokenizer.
MAX_UNUSED_IDS = 2048


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer by Hugging Face path or name; where it has no padding token, the end token is it.

    Raises:
        AgileError: It cannot be loaded, or is not a fast one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(" .:")
        raise AgileError(
            f"Cannot load a tokenizer from {path}: {reason}. Expected a folder with tokenizer.json, as "
            "`agile train` and save_pretrained write it, or a model that was downloaded before."
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise AgileError(
            f"The tokenizer of {path} is a {type(tokenizer).__name__}, expected a fast one (tokenizer.json): "
            "only that keeps what users type apart from action tokens. Choose a model that has one."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_lm(
    path: str, tokenizer: PreTrainedTokenizerFast, *, grow: bool = True, dtype: str = "auto"
) -> PreTrainedModel:
    """A causal LM by Hugging Face path or name.

    Args:
        dtype: `float32`, `bfloat16`, or `auto` for what it was saved in.
        grow: Whether the embeddings are resized if the tokenizer has more tokens (it was given action tokens).

    Raises:
        AgileError: It cannot be loaded, or has another vocabulary than the tokenizer.
    """
    try:
        lm = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise AgileError(f"Cannot load a causal language model from {path!r}: {error}") from None
    num_ids, num_tokens = len(lm.get_output_embeddings().weight), len(tokenizer)
    if num_ids - num_tokens > MAX_UNUSED_IDS or (num_tokens > num_ids and not grow):
        raise AgileError(
            f"The model {path} has a vocabulary of {num_ids}, its tokenizer one of {num_tokens}: they do not belong "
            "together. Take both from one folder."
        )
    if num_tokens > num_ids:
        lm.resize_token_embeddings(num_tokens)
    return lm


def check_context(shape: PretrainedConfig, max_context_tokens: int) -> None:
    """Whether a model can read contexts of this length.

    Raises:
        AgileError: It cannot.
    """
    longest = getattr(shape.get_text_config(), "max_position_embeddings", None)
    if longest is not None and max_context_tokens > longest:
        raise AgileError(
            f"rollout.max_context_tokens is {max_context_tokens}, but the model reads at most {longest} tokens "
            f"(max_position_embeddings). Set rollout.max_context_tokens={longest}, or take another model."
        )
