"""Chat templates of four families, written in their styles, and tokenizers of their kinds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agile.chat_template import chat_turns
from agile.tokens import ActionCodec, add_action_tokens
from agile.types import ActionSpec, AgentSpec, Fn
from tests.worlds import AGENT, NOTES, item

# The agent of notes, who may also ask; then the name of its answer is written for it.
ASKS = AgentSpec(
    "asks",
    (
        *(
            replace(a, followed_by=(*a.followed_by, Fn.SEEK_ADVICE)) if a.name == "Add" else a
            for a in NOTES.actions
            if a.name != Fn.RETRIEVE_MEMORY
        ),
        ActionSpec(Fn.RETRIEVE_MEMORY, "Look.", ("Add", Fn.SEEK_ADVICE, Fn.PREDICT_ANSWER)),
        ActionSpec(Fn.SEEK_ADVICE, "Ask.", (Fn.PREDICT_ANSWER,)),
    ),
)

LLAMA = """\
{{- bos_token }}{% for message in messages %}\
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}\
{% endfor %}{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

QWEN = """\
{% for message in messages %}{% set content = message.content.split('</think>')[-1].lstrip('\n') %}\
{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}\
{% if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}\
{% if open_thinking is defined %}{{- '<think>\n' }}{% endif %}{% endif %}"""

MISTRAL = """\
{{- bos_token }}{% for message in messages %}\
{% if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + '[/INST]' }}\
{% elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}\
{% else %}{{- raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

VICUNA = """\
{% for message in messages %}{% if message['role'] == 'system' %}{{- message['content'] + ' ' }}\
{% elif message['role'] == 'user' %}{{- 'USER: ' + message['content'] + ' ' }}\
{% else %}{{- 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{- 'ASSISTANT:' }}{% endif %}"""

SPECIALS = {
    "llama": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
    "qwen": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
    "vicuna": ["<s>", "</s>"],
}
TEMPLATES = {"llama": LLAMA, "qwen": QWEN, "mistral": MISTRAL, "vicuna": VICUNA}
TEXTS = [*AGENT.corpus([item()]), "steel is washable yes no user assistant system note question USER ASSISTANT"]


@cache
def _backend(family: str) -> str:
    tokenizer = Tokenizer(models.BPE())
    if family in ("llama", "qwen"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        alphabet = [chr(i) for i in range(10, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIALS[family], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if family == "qwen":  # not special there, as in Qwen3
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    return str(tokenizer.to_str())


def family_tokenizer(family: str, template: str | None = None) -> PreTrainedTokenizerFast:
    specials = SPECIALS[family]
    eos = "<|im_end|>" if family == "qwen" else "</s>" if "</s>" in specials else specials[-1]
    bos = None if family == "qwen" else specials[0]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(family)), eos_token=eos, bos_token=bos
    )
    tokenizer.chat_template = TEMPLATES[family] if template is None else template
    return tokenizer


@cache
def family_codec(family: str, special_tokens: bool, keep_thinking: bool = True, *options: str) -> ActionCodec:
    """A codec for the agent that asks; `options` are set true, `-name` false."""
    tokenizer = family_tokenizer(family)
    if special_tokens:
        add_action_tokens(tokenizer, ASKS)
    values: dict[str, Any] = {name.removeprefix("-"): not name.startswith("-") for name in options}
    role: Any = "user" if family == "mistral" else "system"
    turns, end_id = chat_turns(tokenizer, instructions="Act.", role=role, keep_thinking=keep_thinking, options=values)
    return ActionCodec(tokenizer, ASKS, special_tokens=special_tokens, turns=turns, end_id=end_id)
