"""Text to token ids and back, and which ids are actions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agile.errors import AgileError
from agile.types import Action, AgentSpec

END, PAD, UNK = "<end>", "<pad>", "<unk>"


class ActionCodec:
    """A tokenizer together with the actions of an agent.

    Observed text is encoded as plain text: a user who types `[SubmitAnswer]` or `<end>` never produces such a token.

    Raises:
        AgileError: The tokenizer lacks an action token or an end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, spec: AgentSpec):
        vocab = tokenizer.get_vocab()
        if missing := [a.token for a in spec.actions if a.token not in vocab]:
            raise AgileError(
                f"The tokenizer ({len(vocab)} entries) has no token for the actions {', '.join(missing)} of agent "
                f"{spec.name}. Add them with agile.tokens.add_action_tokens(tokenizer, spec) and resize the model's "
                "embeddings, or use the tokenizer saved beside the checkpoint."
            )
        if tokenizer.eos_token_id is None:
            raise AgileError(
                f"The tokenizer of agent {spec.name} has no end token (eos_token), which closes every action. "
                "Set tokenizer.eos_token."
            )
        self.tokenizer = tokenizer
        self.spec = spec
        self.end_id: int = tokenizer.eos_token_id
        self.action_ids: dict[str, int] = {a.name: vocab[a.token] for a in spec.actions}
        self._names = {i: n for n, i in self.action_ids.items()}
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = True
        # A model of whole words holds the names of special tokens as words: nothing but their ids tells them apart.
        unk = tokenizer.unk_token_id
        self._reserved = ({*tokenizer.all_special_ids} - {unk}) | {self.end_id, *self._names}
        self._plain = () if unk is None or unk in self._reserved else (int(unk),)
        self.encode = lru_cache(maxsize=65536)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        text = text.encode("utf-8", "replace").decode()  # lone surrogates, of JSON or a terminal, have no tokens
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return tuple(i for token in ids for i in (self._plain if token in self._reserved else (token,)))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids, action and end tokens included."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def name_of(self, token_id: int) -> str | None:
        """The action that an id stands for, if any."""
        return self._names.get(token_id)

    def encode_action(self, action: Action) -> tuple[int, ...]:
        """What an LLM that chooses `action` emits: its token, its argument, and the end if it takes an argument."""
        head = (self.action_ids[action.name],)
        return head + self.encode_argument(action) if self.spec[action.name].takes_argument else head

    def encode_argument(self, action: Action) -> tuple[int, ...]:
        return (*self.encode(action.argument), self.end_id)

    def parse(self, token_ids: Sequence[int], legal: Sequence[str], forced: str | None) -> Action | str:
        """The action in sampled ids, or a sentence that says what is wrong with them.

        Args:
            token_ids: What was sampled, the stop token included.
            legal: Names of the legal actions.
            forced: The action whose name the executor wrote already, so that only its argument was sampled.
        """
        ids = list(token_ids)
        if forced is None:
            name = self.name_of(ids[0]) if ids else None
            if name is None or name not in legal:
                return "expected one of " + " ".join(legal)
            ids = ids[1:]
        else:
            name = forced
        if not self.spec[name].takes_argument:
            return Action(name) if not ids else f"{name} takes no argument"
        if not ids or ids[-1] != self.end_id:
            return f"{name} did not end"
        if any(i in self._names or i == self.end_id for i in ids[:-1]):
            return f"{name} holds another action"
        return Action(name, self.decode(ids[:-1]).strip())


def add_action_tokens(tokenizer: PreTrainedTokenizerFast, spec: AgentSpec) -> int:
    """Give every action of `spec` one special token; returns how many were new."""
    return int(tokenizer.add_tokens([a.token for a in spec.actions], special_tokens=True))


def build_tokenizer(
    kind: str, texts: Iterable[str], spec: AgentSpec, vocab_size: int = 4096
) -> PreTrainedTokenizerFast:
    """Train a small tokenizer from texts: `word` (white-space words) or `bpe` (byte-level)."""
    specials = [PAD, UNK, END, *(a.token for a in spec.actions)]
    if kind == "word":
        backend = Tokenizer(models.WordLevel(unk_token=UNK))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer: trainers.Trainer = trainers.WordLevelTrainer(
            vocab_size=vocab_size, special_tokens=specials, show_progress=False
        )
    else:
        backend = Tokenizer(models.BPE(unk_token=None))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, unk_token=UNK, eos_token=END)
    tokenizer.padding_side = "left"
    return tokenizer
