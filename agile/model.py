"""The language model with a critic on its trunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from agile.errors import AgileError


class ActorCritic(nn.Module):
    """A causal LM and a value head that reads its last hidden state.

    The head does not send gradients into the trunk: a value loss there was seen to disturb what imitation had learned.

    Raises:
        AgileError: The LM's logits are not its output embedding applied to its last hidden state.
    """

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = lm.eval()  # dropout would make the ratio to the old policy differ from 1 before any update
        size = lm.config.get_text_config().hidden_size
        hidden, value = nn.Linear(size, size), nn.Linear(size, 1)
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

    def forward(self, input_ids: Tensor, attention_mask: Tensor, action_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the model says before each action token; logits are computed there and nowhere else.

        Args:
            input_ids, attention_mask, action_mask: (B, T), padded on the right; the first token is no action.

        Returns:
            Logits (N, V) and values (N,) of the states before the batch's N action tokens, row by row; and the values
            (B,) of the states after each row's last token.
        """
        hidden = self.lm.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        hidden = hidden.last_hidden_state  # (B, T, H)
        before = hidden[:, :-1][action_mask[:, 1:]]  # (N, H)
        last = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(1) - 1]
        return self.lm.get_output_embeddings()(before), self._value(before), self._value(last)

    def parameter_groups(self, value_lr: float) -> list[dict[str, Any]]:
        """The LM's parameters, and the value head's with a learning rate of its own."""
        return [
            {"params": list(self.lm.parameters())},
            {"params": list(self.value_head.parameters()), "lr": value_lr},
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

    def _value(self, hidden: Tensor) -> Tensor:
        dtype = next(self.value_head.parameters()).dtype
        values: Tensor = self.value_head(hidden.detach().to(dtype))
        return values.squeeze(-1).to(torch.promote_types(dtype, torch.float32))


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


def load_lm(path: str, tokenizer: PreTrainedTokenizerFast, *, grow: bool = True) -> PreTrainedModel:
    """A causal LM by Hugging Face path or name.

    Args:
        grow: Whether the embeddings are resized if the tokenizer has more tokens (it was given action tokens).

    Raises:
        AgileError: It cannot be loaded, or has another vocabulary than the tokenizer.
    """
    try:
        lm = AutoModelForCausalLM.from_pretrained(path)
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


def check_context(lm: PreTrainedModel, max_context_tokens: int) -> None:
    """Whether a model can read contexts of this length.

    Raises:
        AgileError: It cannot.
    """
    longest = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and max_context_tokens > longest:
        raise AgileError(
            f"rollout.max_context_tokens is {max_context_tokens}, but the model reads at most {longest} tokens "
            f"(max_position_embeddings). Set rollout.max_context_tokens={longest}, or take another model."
        )
