"""The language model with a critic on its trunk."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from agile.errors import AgileError


class ActorCritic(nn.Module):
    """A causal LM and a value head that reads its last hidden state.

    The head does not send gradients into the trunk: a value loss there was seen to disturb what imitation had learned.
    """

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = lm
        size = lm.config.hidden_size
        self.value_head = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, 1))
        nn.init.zeros_(self.value_head[2].weight)
        nn.init.zeros_(self.value_head[2].bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(B, T, V)` and values `(B, T)`, both of the position after each token."""
        output = self.lm(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False
        )
        hidden = output.hidden_states[-1].detach()
        return output.logits, self.value_head(hidden.to(self.value_head[0].weight.dtype)).squeeze(-1)


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


def load_lm(path: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A causal LM by Hugging Face path or name, embeddings resized if the tokenizer has grown.

    Raises:
        AgileError: It cannot be loaded.
    """
    try:
        lm = AutoModelForCausalLM.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise AgileError(f"Cannot load a causal language model from {path!r}: {error}") from None
    if len(tokenizer) > lm.config.vocab_size:
        lm.resize_token_embeddings(len(tokenizer))
    return lm
