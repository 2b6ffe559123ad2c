"""A tiny language model whose next token is neither certain nor uniform."""

import pytest
import torch
from transformers import LlamaForCausalLM

from agile.model import small_llama
from tests.worlds import make_codec


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    tokenizer = make_codec("word").tokenizer
    lm = small_llama(tokenizer, num_layers=2, hidden_size=16, num_heads=2, max_tokens=512, seed=0)
    with torch.no_grad():
        lm.lm_head.weight.mul_(20)  # logits of a deviation of about 1.5
    lm.eval()
    return lm
