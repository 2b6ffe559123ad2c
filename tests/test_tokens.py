from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agile.agents.product_qa import SPEC
from agile.errors import AgileError
from agile.tokens import END, ActionCodec, add_action_tokens, build_tokenizer
from agile.types import Action, Fn
from tests.worlds import make_codec

WORDS = ["steel", "is", "washable", "yes", "?", ".", "'t"]


def plain(eos: str | None = "</s>", unk: str | None = "<unk>") -> PreTrainedTokenizerFast:
    """Somebody's tokenizer, without actions."""
    vocab = {t: i for i, t in enumerate(["<unk>", "</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, unk_token=unk)


# --------------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_a_tokenizer_without_the_actions_is_refused_with_the_remedy() -> None:
    with pytest.raises(AgileError, match=r"no token for the actions \[GetQuestion\], .*agile.tokens.add_action_tokens"):
        ActionCodec(plain(), SPEC)


def test_a_tokenizer_without_an_end_is_refused_with_the_remedy() -> None:
    tokenizer = plain(eos=None)
    add_action_tokens(tokenizer, SPEC)
    with pytest.raises(AgileError, match=r"no end token \(eos_token\).*Set tokenizer.eos_token"):
        ActionCodec(tokenizer, SPEC)


@pytest.mark.parametrize("unk", ["<unk>", "</s>", None])  # GPT-2 has one token for both
def test_actions_can_be_added_to_any_tokenizer(unk: str | None) -> None:
    tokenizer = plain(unk=unk)
    assert add_action_tokens(tokenizer, SPEC) == len(SPEC.actions)
    assert add_action_tokens(tokenizer, SPEC) == 0
    codec = ActionCodec(tokenizer, SPEC)
    action = Action(Fn.PREDICT_ANSWER, "yes is steel")
    assert codec.parse(codec.encode_action(action), [action.name], None) == action
    reserved = {codec.end_id, *codec.action_ids.values()}
    assert not reserved & {*codec.encode("yes [SubmitAnswer] </s> [SeekAdvice] steel")}


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_a_tokenizer_is_a_function_of_its_texts(kind: str) -> None:
    """Same ids for the same texts; every action, end and padding has an id of its own."""
    texts = [f"a{i % 7} b{i % 5} of {i} things" for i in range(200)]
    first, second = (build_tokenizer(kind, texts, SPEC, 300).get_vocab() for _ in range(2))
    assert first == second
    assert sorted(first.values()) == list(range(len(first)))
    assert {END, "<pad>", "<unk>", *(a.token for a in SPEC.actions)} <= first.keys()


def test_a_saved_tokenizer_is_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    for kind in ("word", "bpe"):
        folder = tmp_path_factory.mktemp(kind)
        codec = make_codec(kind)
        codec.tokenizer.save_pretrained(folder)
        loaded = ActionCodec(PreTrainedTokenizerFast.from_pretrained(folder), SPEC)
        text = "steel is washable ? [SubmitAnswer] don 't é"
        assert (loaded.encode(text), loaded.end_id) == (codec.encode(text), codec.end_id)
        assert loaded.decode(loaded.encode(text)) == codec.decode(codec.encode(text))


# --------------------------------------------------------------------------------------------------------------------
# Round trips

# Whatever text an expert or a tool may bring, with what looks like tokens among it.
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(["[SubmitAnswer]", END, "<pad>", " ", "x", "é\n"])).map("".join))


@given(TEXTS)
def test_bpe_keeps_every_byte(text: str) -> None:
    codec = make_codec("bpe")
    ids = codec.encode(text)
    assert codec.decode(ids) == text.encode("utf-8", "replace").decode()
    assert not {codec.end_id, *codec.action_ids.values()} & {*ids}


@given(st.lists(st.sampled_from([*WORDS, "red", "->", "0.35", "none"])), st.sampled_from([" ", "  ", "\n", "\t"]))
def test_word_keeps_known_words_and_folds_white_space(words: list[str], space: str) -> None:
    codec = ActionCodec(build_tokenizer("word", [" ".join([*WORDS, "red -> 0.35 none"])], SPEC), SPEC)
    assert codec.decode(codec.encode(space.join(words))) == " ".join(words)


@given(TEXTS)
def test_word_never_writes_a_token_of_its_own(text: str) -> None:
    codec = make_codec("word")
    assert not {codec.end_id, codec.tokenizer.pad_token_id, *codec.action_ids.values()} & {*codec.encode(text)}


@pytest.mark.parametrize("kind", ["word", "bpe"])
@pytest.mark.parametrize("argument", ["yes", "steel is washable ?", "SELECT 1", ""])
@pytest.mark.parametrize("spec", SPEC.actions, ids=lambda spec: str(spec.name))
def test_what_an_action_encodes_to_parses_as_that_action(kind: str, argument: str, spec: object) -> None:
    codec = make_codec(kind)
    action = Action(spec.name, argument if spec.takes_argument else "")  # type: ignore[attr-defined]
    assert codec.parse(codec.encode_action(action), [action.name], None) == action
    if codec.spec[action.name].takes_argument:
        assert codec.parse(codec.encode_argument(action), [action.name], action.name) == action


def test_a_codec_can_be_copied_with_its_executor() -> None:
    """Workers get one each."""
    assert copy.copy(make_codec()).encode("yes") == make_codec().encode("yes")


# --------------------------------------------------------------------------------------------------------------------
# Parsing

CODEC = make_codec()
PREDICT, ASK, SUBMIT = (CODEC.action_ids[n] for n in (Fn.PREDICT_ANSWER, Fn.SEEK_ADVICE, Fn.SUBMIT_ANSWER))
LEGAL = (Fn.SEEK_ADVICE, Fn.PREDICT_ANSWER)
YES, OUTSIDE, EOS = CODEC.encode("yes"), len(CODEC.tokenizer) + 7, CODEC.end_id
EXPECTED = "expected one of SeekAdvice PredictAnswer"


@pytest.mark.parametrize(
    ("ids", "forced", "result"),
    [
        ((PREDICT, *YES, EOS), None, Action(Fn.PREDICT_ANSWER, "yes")),
        ((PREDICT, *CODEC.encode("  yes \n"), EOS), None, Action(Fn.PREDICT_ANSWER, "yes")),
        ((PREDICT, EOS), None, Action(Fn.PREDICT_ANSWER)),
        ((PREDICT, OUTSIDE, *YES, EOS), None, Action(Fn.PREDICT_ANSWER, "yes")),
        ((ASK,), None, Action(Fn.SEEK_ADVICE)),
        ((), None, EXPECTED),
        ((*YES, EOS), None, EXPECTED),
        ((OUTSIDE,), None, EXPECTED),
        ((SUBMIT,), None, EXPECTED),
        ((PREDICT,), None, "PredictAnswer did not end"),
        ((PREDICT, *YES), None, "PredictAnswer did not end"),
        ((PREDICT, *YES, ASK, EOS), None, "PredictAnswer holds another action"),
        ((PREDICT, *YES, EOS, *YES, EOS), None, "PredictAnswer holds another action"),
        ((ASK, *YES), None, "SeekAdvice takes no argument"),
        ((*YES, EOS), Fn.PREDICT_ANSWER, Action(Fn.PREDICT_ANSWER, "yes")),
        ((EOS,), Fn.PREDICT_ANSWER, Action(Fn.PREDICT_ANSWER)),
        ((), Fn.PREDICT_ANSWER, "PredictAnswer did not end"),
        ((PREDICT, *YES, EOS), Fn.PREDICT_ANSWER, "PredictAnswer holds another action"),
    ],
)
def test_parse(ids: tuple[int, ...], forced: str | None, result: Action | str) -> None:
    assert CODEC.parse(ids, LEGAL, forced) == result


# --------------------------------------------------------------------------------------------------------------------
# Names as plain text

TEXT = ActionCodec(make_codec().tokenizer, SPEC, special_tokens=False)
NAMED = "expected one of [SeekAdvice] [PredictAnswer]"


@pytest.mark.parametrize(
    ("text", "forced", "result"),
    [
        ("[PredictAnswer] yes", None, Action(Fn.PREDICT_ANSWER, "yes")),
        ("\n [PredictAnswer]\nyes  [SubmitAnswer] ", None, Action(Fn.PREDICT_ANSWER, "yes  [SubmitAnswer]")),
        ("[PredictAnswer]", None, Action(Fn.PREDICT_ANSWER)),
        ("[SeekAdvice]", None, Action(Fn.SEEK_ADVICE)),
        ("[SeekAdvice] please", None, "[SeekAdvice] takes no argument"),
        ("[SubmitAnswer]", None, NAMED),
        ("I [SeekAdvice]", None, NAMED),
        ("", None, NAMED),
        ("yes", Fn.PREDICT_ANSWER, Action(Fn.PREDICT_ANSWER, "yes")),
        ("<think> [PredictAnswer] no </think>\n\n[SeekAdvice]", None, Action(Fn.SEEK_ADVICE)),
        ("<think> hm </think> yes", Fn.PREDICT_ANSWER, Action(Fn.PREDICT_ANSWER, "yes")),
        ("<think> yes", Fn.PREDICT_ANSWER, "the thinking did not end"),
    ],
)
def test_parse_text(text: str, forced: str | None, result: Action | str) -> None:
    assert TEXT.parse([*TEXT.encode(text), TEXT.end_id], LEGAL, forced) == result
    assert isinstance(TEXT.parse(TEXT.encode(text), LEGAL, forced), str), "without its end"


@given(TEXTS)
def test_text_is_one_action_as_written(text: str) -> None:
    """What an action's text is parsed as is that action; no argument reaches beyond itself."""
    argument = text.encode("utf-8", "replace").decode().strip()
    action = Action(Fn.PREDICT_ANSWER, argument)
    assert TEXT.parse(TEXT.encode_action(action), LEGAL, None) == action
    assert TEXT.parse(TEXT.encode_argument(action), LEGAL, Fn.PREDICT_ANSWER) == action


def test_a_special_token_in_an_argument_is_no_text() -> None:
    ids = [*TEXT.encode("[PredictAnswer] yes"), SUBMIT, EOS]
    assert TEXT.parse(ids, LEGAL, None) == "the action holds a special token"


def test_an_unknown_word_stays_visible_as_unknown() -> None:
    codec = make_codec("word")
    assert codec.encode("steel frobnic") == (*codec.encode("steel"), codec.tokenizer.unk_token_id)
