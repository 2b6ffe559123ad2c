"""DPO and the reward model: TRL's trainers on pairs, and what they leave."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from agile.config import load_config
from agile.errors import AgileError
from agile.model import small_llama
from agile.stages.preference import read_pairs
from agile.tokens import ActionCodec
from agile.train.preference import Schedule, import_trl, split_pairs, train_dpo, train_reward_model
from agile.types import Action, Fn
from tests.tiny import TINY, agile
from tests.worlds import make_codec

COLOURS = {"red": "yes", "blue": "no"}
SCHEDULE = Schedule(
    lr=3e-3, batch_size=16, micro_batch_size=16, num_epochs=6, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0
)


def colour_pairs(codec: ActionCodec, num: int) -> list[dict[str, str]]:
    """What is right depends on the first word, which a longer or shorter context follows."""
    pairs = []
    for i in range(num):
        colour, filler = ("red", "blue")[i % 2], " steel" * (1 + i % 5) + " washable" * (i % 3)
        right, wrong = COLOURS[colour], COLOURS["blue" if colour == "red" else "red"]
        chosen, rejected = (str(Action(Fn.PREDICT_ANSWER, answer)) + " <end>" for answer in (right, wrong))
        pairs.append({"prompt": f"{colour}{filler} ", "chosen": chosen, "rejected": rejected})
    return pairs


@pytest.mark.slow
def test_dpo_raises_the_margin_on_pairs_it_never_saw_and_the_reward_model_ranks_them(tmp_path: Path) -> None:
    codec = make_codec("word")
    lm = small_llama(codec.tokenizer, num_layers=2, hidden_size=32, num_heads=2, max_tokens=64, seed=0)
    lm.save_pretrained(tmp_path / "sft")
    kept, held_out = split_pairs(colour_pairs(codec, 240), 0.2, seed=0)
    logs: list[tuple[int, Mapping[str, float]]] = []
    arguments = {"schedule": SCHEDULE, "seed": 0, "on_log": lambda step, figures: logs.append((step, figures))}
    trained = train_dpo(lm, codec.tokenizer, kept, held_out, beta=0.1, **arguments)  # type: ignore[arg-type]
    assert "loss" in logs[0][1] and logs[0][0] == 1
    assert logs[-1][1]["eval_rewards/margins"] > 0.1 and logs[-1][1]["eval_rewards/accuracies"] > 0.8
    trained.save_pretrained(tmp_path / "dpo")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dpo").config.model_type == "llama"

    scorer = train_reward_model(tmp_path / "sft", codec.tokenizer, kept, held_out, **arguments)  # type: ignore[arg-type]
    assert logs[-1][1]["eval_accuracy"] > 0.8
    scorer.save_pretrained(tmp_path / "reward-model")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward-model").eval()
    texts = [pair["prompt"] + pair[name] for pair in held_out for name in ("chosen", "rejected")]
    with torch.no_grad():
        rewards = loaded(**codec.tokenizer(texts, padding=True, return_tensors="pt")).logits.view(-1, 2)
    assert (rewards[:, 0] > rewards[:, 1]).float().mean() > 0.8


@pytest.mark.slow
def test_a_run_of_all_stages_leaves_agents_that_play(tmp_path: Path) -> None:
    from tests.runs import CONFIG

    data, out = tmp_path / "pairs.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in colour_pairs(make_codec("word"), 12)))
    words = [*TINY, "stages=[sft,ppo,dpo,reward-model]", f"preferences.data={data}", f"out={out}"]
    result = agile("train", CONFIG, *words, "dpo.lr=1e-4", "dpo.batch_size=4", "dpo.micro_batch_size=2")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"sft", "ppo", "dpo", "reward-model"}
    assert [line["step"] for line in lines if line["stage"] == "dpo"] == [1, 2, 3, 3]
    assert (out / "reward-model" / "tokenizer.json").exists()
    before, after = (AutoModelForCausalLM.from_pretrained(out / name).lm_head.weight for name in ("ppo", "dpo"))
    assert not torch.equal(before, after)

    result = agile("bench", out / "config.yaml", f"evaluate.checkpoint={out}", f"out={out}", "evaluate.baselines=[]")
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert {"sft", "ppo", "dpo"} <= set(report["agents"])
    assert "dpo" in agile("chat", out, stdin="/quit\n").output

    (out / "dpo" / "config.json").unlink()  # as if it was killed in that stage
    again = agile("train", CONFIG, *words, "dpo.lr=1e-4", "dpo.batch_size=4", "dpo.micro_batch_size=2", "--resume")
    assert again.exit_code == 0, again.output
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out / "dpo").lm_head.weight, after)
    assert [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] == lines


@pytest.mark.slow
def test_a_model_of_bfloat16_learns_in_float32() -> None:
    """Steps of 1e-6 of its size would be rounded away; TRL's figures show that it moved."""
    codec = make_codec("word")
    lm = small_llama(codec.tokenizer, num_layers=2, hidden_size=32, num_heads=2, max_tokens=64, seed=0)
    torch.nn.Module.to(lm, torch.bfloat16)
    kept, held_out = split_pairs(colour_pairs(codec, 60), 0.2, seed=0)
    logs: list[Mapping[str, float]] = []
    schedule = replace(SCHEDULE, lr=2e-5, num_epochs=3, gradient_checkpointing=True)
    trained = train_dpo(
        lm,
        codec.tokenizer,
        kept,
        held_out,
        beta=0.1,
        schedule=schedule,
        seed=0,
        on_log=lambda step, figures: logs.append(figures),
    )
    assert trained.dtype == torch.bfloat16
    assert [line for line in logs if "rewards/margins" in line][-1]["rewards/margins"] > 1e-4


def test_without_trl_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(AgileError, match=r"\.\[trl\]"):
        import_trl()


def test_pairs_are_split_by_the_seed_and_none_is_lost() -> None:
    pairs = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(20)]
    kept, held_out = split_pairs(pairs, 0.2, seed=0)
    assert len(held_out) == 4 and sorted([*kept, *held_out], key=lambda pair: int(pair["prompt"])) == pairs
    assert split_pairs(pairs, 0.2, seed=0) == (kept, held_out) != split_pairs(pairs, 0.2, seed=1)
    assert [len(part) for part in split_pairs(pairs[:2], 1.0, seed=0)] == [1, 1]
    with pytest.raises(AgileError, match="1 preference pairs, expected at least 2"):
        split_pairs(pairs[:1], 0.2, seed=0)


def test_a_file_of_another_format_is_refused_by_its_line(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "session": "s/0"}\n{"chosen": "b"}\n')
    with pytest.raises(AgileError, match="line 2: expected an object"):
        read_pairs(data)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages=[ppo,sft]"], "in this order"),
        (["stages=[sft,sft]"], "each once"),
        (["stages=[ppo]"], "ppo without sft"),
        (["stages=[dpo]", "preferences.data=x"], "model.path names no agent"),
        (["stages=[sft,dpo]"], "preferences.data=FILE"),
        (["stages=[sft,ppo,dpo]", "ppo.num_iterations=0"], "preferences.data=FILE"),
        (["stages=[sft,ppo,dpo]", "lora.rank=4", "model.path=x"], "has dpo, .* but lora is an adapter"),
        (["stages=[sft,ppo,dpo]", "engine.zero_stage=2"], "engine.zero_stage is 2; leave engine.zero_stage out"),
        (
            ["stages=[sft,ppo,reward-model]", "engine={zero_stage: 1, offload: optimizer}"],
            "engine.offload is optimizer",
        ),
        (["dpo.batch_size=6", "dpo.micro_batch_size=4"], "does not divide"),
    ],
)
def test_stages_that_cannot_be_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(AgileError, match=message):
        load_config(None, overrides)
