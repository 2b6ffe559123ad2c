"""Text to token ids and back, and which ids are actions."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agile.errors import AgileError
from agile.types import Action, AgentSpec, Item

END, PAD, UNK = "<end>", "<pad>", "<unk>"
THINK, THINK_END = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Turns:
    """Token ids that a prompt format puts around what is observed and what is sampled; all empty in the plain format.

    Attributes:
        opening: From the start of a context window to the first observed text: instructions, the user's role.
        to_llm: After observed text: ends the user's turn and opens the LLM's.
        to_llm_before: The same in a turn that is already answered; differs where the template puts an empty thinking
            block into the turn that is to be sampled.
        to_user: After the end of the LLM's turn: opens the user's.
        end_thinking: Ends the thinking that `to_llm` opens, if it does: actions come after it.
        keep_thinking: Whether thinking stays in the context. If not, the window ends with each turn that thought, and
            the next one starts with the same tokens but the thinking.
    """

    opening: tuple[int, ...] = ()
    to_llm: tuple[int, ...] = ()
    to_llm_before: tuple[int, ...] = ()
    to_user: tuple[int, ...] = ()
    end_thinking: tuple[int, ...] = ()
    keep_thinking: bool = True


class PlainText:
    """Encodes text as text: what is typed like a special token never becomes one.

    Args:
        reserved: Further ids that no text gives.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, reserved: Iterable[int] = ()):
        # What is special is not found in text; some families leave `</think>` and the like plain additions.
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in backend["added_tokens"]:
            token["special"] |= bool(token["content"].strip())  # but runs of spaces are text
        self._backend = Tokenizer.from_str(json.dumps(backend))
        self._backend.encode_special_tokens = True
        # A model of whole words holds the names of special tokens as words: nothing but their ids tells them apart.
        unk = tokenizer.unk_token_id
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.reserved = ((special | {*tokenizer.all_special_ids}) - {unk}) | set(reserved)
        self._plain = () if unk is None or unk in self.reserved else (int(unk),)

    def __call__(self, text: str) -> tuple[int, ...]:
        text = text.encode("utf-8", "replace").decode()  # lone surrogates, of JSON or a terminal, have no tokens
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return tuple(i for token in ids for i in (self._plain if token in self.reserved else (token,)))


class ActionCodec:
    """A tokenizer together with the actions of an agent and the format of its prompts.

    Observed text is encoded as plain text: a user who types `[SubmitAnswer]` or `<end>` never produces such a token.

    Args:
        tokenizer: A fast tokenizer.
        spec: The agent's actions.
        special_tokens: Whether an action's name is one special token, or plain text that is parsed from what the LLM
            sampled (never from what it was shown).
        turns: What a chat template puts around turns; the plain format by default.
        end_id: The token that closes an action; the tokenizer's end token by default.

    Raises:
        AgileError: The tokenizer lacks an action token or an end token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        spec: AgentSpec,
        *,
        special_tokens: bool = True,
        turns: Turns | None = None,
        end_id: int | None = None,
    ):
        vocab = tokenizer.get_vocab()
        if special_tokens and (missing := [a.token for a in spec.actions if a.token not in vocab]):
            raise AgileError(
                f"The tokenizer ({len(vocab)} entries) has no token for the actions {', '.join(missing)} of agent "
                f"{spec.name}. Add them with agile.tokens.add_action_tokens(tokenizer, spec) and resize the model's "
                "embeddings, or use the tokenizer saved beside the checkpoint."
            )
        if end_id is None and tokenizer.eos_token_id is None:
            raise AgileError(
                f"The tokenizer of agent {spec.name} has no end token (eos_token), which closes every action. "
                "Set tokenizer.eos_token."
            )
        self.tokenizer = tokenizer
        self.spec = spec
        self.turns = turns or Turns()
        self.special_tokens = special_tokens
        self.end_id: int = tokenizer.eos_token_id if end_id is None else end_id
        self.action_ids: dict[str, int] = {a.name: vocab[a.token] for a in spec.actions} if special_tokens else {}
        self._names = {i: n for n, i in self.action_ids.items()}
        plain = PlainText(tokenizer, {self.end_id, *self._names})
        self._reserved = plain.reserved
        self.encode = lru_cache(maxsize=65536)(plain)

    def question_ids(self, item: Item, text: str) -> tuple[int, ...]:
        """What shows a question, of which `text` is what the agent says."""
        return self.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids, action and end tokens included."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    @property
    def end(self) -> str:
        """The text of the end token."""
        return self.decode([self.end_id])

    def conversation(self, token_ids: Sequence[int]) -> str:
        """The text of a context without what the prompt format put around it."""
        ids = list(token_ids)[len(self.turns.opening) :]
        for piece in sorted({self.turns.to_llm, self.turns.to_llm_before, self.turns.to_user}, key=len, reverse=True):
            ids = _without(ids, piece)
        return self.decode(ids)

    def name_of(self, token_id: int) -> str | None:
        """The action that an id stands for, if any."""
        return self._names.get(token_id)

    def awaited(self, token_ids: Sequence[int]) -> str | None:
        """The action whose name stands at the end of a context and whose argument is to come, if any."""
        if self.special_tokens:
            name = self.name_of(token_ids[-1])
            return name if name is not None and self.spec[name].takes_argument else None
        text = self.decode(token_ids[-64:])
        return next((a.name for a in self.spec.actions if a.takes_argument and text.endswith(a.token)), None)

    def name_ids(self, name: str) -> tuple[int, ...]:
        """What the executor writes for an action that is the only legal one."""
        if self.special_tokens:
            return (self.action_ids[name],)
        return self.encode(f"[{name}]" if self.spec[name].takes_argument else f"[{name}]\n")

    def stop_ids(self, legal: Sequence[str], forced: str | None) -> set[int]:
        """Where the LLM has to stop: at the end token, or at the name of an action without an argument."""
        if forced is not None or not self.special_tokens:
            return {self.end_id}
        return {self.end_id} | {self.action_ids[n] for n in legal if not self.spec[n].takes_argument}

    def encode_action(self, action: Action) -> tuple[int, ...]:
        """What an LLM that chooses `action` emits: its name, its argument, and the end if it takes an argument."""
        thought = self.turns.end_thinking
        if not self.special_tokens:
            return (*thought, *self.encode(str(action)), self.end_id)
        head = (*thought, self.action_ids[action.name])
        return head + self.encode_argument(action) if self.spec[action.name].takes_argument else head

    def encode_argument(self, action: Action) -> tuple[int, ...]:
        return (*self.encode(action.argument), self.end_id)

    def num_thinking(self, token_ids: Sequence[int]) -> int:
        """How many of the sampled ids, from the first, are a thinking block, its end and white space included."""
        if THINK_END not in self.decode(token_ids):
            return 0
        lengths = range(len(token_ids) + 1)
        num = bisect_left(lengths, True, key=lambda n: THINK_END in self.decode(token_ids[:n]))
        while num < len(token_ids) and not self.decode(token_ids[num : num + 1]).strip():
            num += 1
        return num

    def parse(self, token_ids: Sequence[int], legal: Sequence[str], forced: str | None) -> Action | str:
        """The action in sampled ids, or a sentence that says what is wrong with them; a thinking block is skipped.

        Args:
            token_ids: What was sampled, the stop token included.
            legal: Names of the legal actions.
            forced: The action whose name the executor wrote already, so that only its argument was sampled.
        """
        thinking = self.num_thinking(token_ids)
        ids = list(token_ids[thinking:])
        opened = forced is None and self.turns.end_thinking
        if (opened and not thinking) or self.decode(ids).lstrip().startswith(THINK):
            return "the thinking did not end"
        if not self.special_tokens:
            return self._parse_text(ids, legal, forced)
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

    def _parse_text(self, ids: list[int], legal: Sequence[str], forced: str | None) -> Action | str:
        if not ids or ids[-1] != self.end_id:
            return f"{forced or 'the action'} did not end"
        ids = ids[:-1]
        if not self._reserved.isdisjoint(ids):
            return f"{forced or 'the action'} holds a special token"
        text = self.decode(ids).strip()
        if forced is not None:
            return Action(forced, text)
        found = re.match(r"\[([^\[\]]+)\]\s*(.*)", text, re.DOTALL)
        if found is None or found[1] not in legal:
            return "expected one of " + " ".join(f"[{name}]" for name in legal)
        if found[2] and not self.spec[found[1]].takes_argument:
            return f"[{found[1]}] takes no argument"
        return Action(found[1], found[2])


def _without(ids: list[int], piece: tuple[int, ...]) -> list[int]:
    """The ids without the places where `piece` stands."""
    if not piece:
        return ids
    kept: list[int] = []
    i = 0
    while i < len(ids):
        if tuple(ids[i : i + len(piece)]) == piece:
            i += len(piece)
        else:
            kept.append(ids[i])
            i += 1
    return kept


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
