"""A learner tells the loop what its settings say; `imitate` learns the assistant's tokens and no others."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import agile.learner
from agile.credit import Estimator
from agile.errors import AgileError
from agile.learner import Learner, imitate
from agile.model import load_lm, load_tokenizer
from agile.train.kl import KLControl
from agile.train.ppo import Discounts
from tests.gateway.agents import make_model
from tests.stages.test_ppo import EXPECTED, NO_CRITIC, UPDATE, Told


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model")))


def test_a_learner_tells_the_loop_what_its_settings_say(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    monkeypatch.setattr(agile.learner, "train_ppo", told)
    with Learner(tmp_path / "a", model=model, ppo=UPDATE, temperature=0.9, seed=5) as learner:
        learner.step([])
        assert {name: told[name] for name in EXPECTED} == EXPECTED
        assert told["discounts"] == Discounts(0.9, 0.8)
        assert told["kl_control"] == KLControl(0.05, 0.01)
        assert (told["first_iteration"], told["num_iterations"]) == (0, 1)
        assert told["groups"] == [(1e-3, 0.125), (2e-3, 0.125)] and told["reference"] is not None
        told["kl_control"].coef = 0.07
        learner.step([])
        assert (told["first_iteration"], told["num_iterations"]) == (1, 2)
    with Learner(tmp_path / "a", model=model, ppo=UPDATE, temperature=0.9, seed=5, resume=True) as learner:
        learner.step([])
        assert told["kl_control"] == KLControl(0.07, 0.01) and told["first_iteration"] == 2
    with Learner(tmp_path / "b", model=model, ppo={**NO_CRITIC, "kl_coef": 0}) as learner:
        learner.step([])
        assert told["estimator"] is Estimator.REINFORCE and told["reference"] is None
        assert told["max_epoch_kl"] == math.inf


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_imitation_is_of_the_assistants_tokens_and_the_ends_of_its_turns(model: str, tmp_path: Path) -> None:
    conversation = [message("user", "a"), message("assistant", "one"), message("user", "b"), message("assistant", "")]
    losses: list[float] = []
    imitate(
        model, tmp_path / "out", [conversation], num_steps=2, lr=1e-2, on_step=lambda step, loss: losses.append(loss)
    )
    tokenizer = load_tokenizer(model)
    texts = [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "one<|im_end|>",
        "\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ]
    parts: list[list[int]] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ids = torch.tensor([[i for part in parts for i in part]])
    own = torch.tensor([i % 2 == 1 for i, part in enumerate(parts) for _ in part])
    with torch.no_grad():
        logprobs = load_lm(model, tokenizer)(input_ids=ids).logits[0].log_softmax(-1)
    of_each = logprobs[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    assert losses[0] == pytest.approx(-float(of_each[own[1:]].mean()), abs=1e-5)
    assert losses[1] < losses[0]


def test_conversations_without_the_assistant_teach_nothing(model: str, tmp_path: Path) -> None:
    with pytest.raises(AgileError, match="None of the 2 conversations holds a turn of the assistant"):
        imitate(model, tmp_path, [[message("user", "a")]] * 2, num_steps=1, lr=1e-2)
