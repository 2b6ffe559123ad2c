"""What a run can be told, and what it answers when it is told something else."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agile.config import RunConfig, differences, load_config
from agile.errors import AgileError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


def value(config: RunConfig, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("ppo.lr=1e-4", 1e-4),  # text in YAML 1.1
        ("ppo.lr=5", 5.0),
        ("sft.num_steps=1e3", 1000),
        ("evaluate.baselines=[router, recall]", ("router", "recall")),
        ("evaluate.agents=[]", ()),
        ("task.train_groups=[mice]", ("mice",)),
        ("task.data=some/where", Path("some/where")),
        ("task.data=~/x", Path.home() / "x"),
        ("memory.cache=~/x.sqlite", Path.home() / "x.sqlite"),
        ("evaluate.checkpoint=~/x", (Path.home() / "x",)),
        ("model.path=~/x", str(Path.home() / "x")),
        ("model.path=1e5x", "1e5x"),
        ("threads=", None),
        ("demo.shuffle_rewards=true", True),
        ("evaluate.notes=['a = b: c']", ("a = b: c",)),
    ],
)
def test_override(override: str, expected: object) -> None:
    found = value(load_config(None, [override]), override.partition("=")[0])
    assert found == expected and type(found) is type(expected)


def test_last_override_wins_and_the_file_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("ppo: {lr: 1e-3, clip: .3}\nmemory:\n")
    config = load_config(path, ["ppo.lr=1e-4", "ppo.lr=1e-5"])
    assert (config.ppo.lr, config.ppo.clip, config.memory) == (1e-5, 0.3, RunConfig().memory)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        # unknown keys: the nearest right one
        ("ppo.clipp=1", ["Unknown key ppo.clipp", "Did you mean ppo.clip?"]),
        ("pp.lr=1", ["Unknown key pp.", "Did you mean ppo?"]),
        ("lr=1", ["Unknown key lr.", "Did you mean sft.lr or ppo.lr or dpo.lr or reward_model.lr?"]),
        ("qqq=1", ["Unknown key qqq.", "There are seed, threads, lora"]),
        ("a..b=1", ["Unknown key a."]),
        # values: key, value, what was expected
        ("engine.offload=all", ["offload is all, which ZeRO supports from stage 3", "engine.zero_stage=3"]),
        ("engine.offload=optimizer", ["from stage 1", "zero_stage is 0"]),
        ("engine.dtype=bfloat16", ["dtype is bfloat16", "engine.zero_stage=1"]),
        ("engine.zero_stage=4", ["engine.zero_stage is 4", "0, 1, 2 or 3"]),
        ("ppo.lr=-1", ["ppo.lr is -1", "expected greater than 0", "default is 0.0003"]),
        ("ppo.lr=abc", ["ppo.lr is 'abc'", "expected a valid number"]),
        ("ppo.lr=inf", ["ppo.lr", "finite"]),
        ("ppo.lr=nan", ["ppo.lr", "finite"]),
        ("ppo.lr=", ["ppo.lr is None"]),
        ("ppo.lr.x=1", ["ppo.lr is {'x': 1}"]),
        ("sft.num_steps=1.5", ["sft.num_steps is 1.5", "expected a valid integer"]),
        ("task.name=minishopp", ["task.name is 'minishopp'", "'minishop'", "'productqa'"]),
        ("task.advice_price=0", ["task.advice_price is 0", "greater than 0"]),
        ("task.advice_price=1.5", ["task.advice_price is 1.5", "less than or equal to 1"]),
        ("evaluate.baselines=router", ["evaluate.baselines is 'router'", "expected a list, [a, b]"]),
        ("evaluate.baselines=[routr]", ["evaluate.baselines is 'routr'", "'router'"]),
        ("task=3", ["task is 3", "section of keys", "advice_price"]),
        ("lora=16", ["lora is 16: expected a section of keys, rank, alpha", "lora.rank="]),
        ("ppo.micro_batch_size=4", ["Did you mean ppo.micro_batch_tokens?"]),
        ("ppo.learning_rate=1", ["Did you mean ppo.lr?"]),
        ("rollout.top_p=0.9", ["top_p is 0.9", "bias every importance ratio", "rollout.temperature"]),
        ("rollout.min_p=0.1", ["min_p is 0.1", "remove it"]),
        ("rollout.policy=vllm-server", ["vllm.servers is missing", "docs/vllm.md"]),
        ("prompt.instructions=system", ["format is plain", "set instructions to user"]),
        ("rollout.masked=[broken]", ["rollout.masked", "'tool_timeout'"]),
        ("seed=-1", ["seed is -1"]),
        ("task.num_questions=0", ["task.num_questions is 0", "greater than or equal to 1", "default is 40"]),
        ("ppo.micro_batch_tokens=0", ["ppo.micro_batch_tokens is 0", "greater than or equal to 1"]),
        # several keys that do not go together
        ("model.num_heads=3", ["model: hidden_size 128", "2 * num_heads = 6"]),
        ("ppo.credit=chain", ["ppo: credit is chain", "gamma_session above 0"]),
        ("ppo.credit=lineage", ["ppo: credit is lineage", "set it above 0"]),
        (
            "ppo={credit: lineage, gamma_session: 0.9, value_warmup_epochs: 0}",
            ["ppo: credit is lineage", "value_warmup_epochs is 0"],
        ),
        ("ppo={kl_target: 0.1, kl_coef: 0}", ["ppo: kl_target is set, but kl_coef is 0"]),
        (
            "ppo.estimator=group",
            ["ppo: estimator is group, which has no critic, but value_coef is 0.5", "value_coef=0"],
        ),
        ("ppo={estimator: reinforce++, value_coef: 0}", ["value_warmup_epochs is 6", "ppo.value_warmup_epochs=0"]),
        (
            "ppo={estimator: group, value_coef: 0, value_warmup_epochs: 0}",
            ["rollouts_per_stream is 1; set it to 2 or more"],
        ),
        (
            "ppo={estimator: group, value_coef: 0, value_warmup_epochs: 0, rollouts_per_stream: 2, gamma: 0.9}",
            ["gamma is 0.9; set gamma to 1"],
        ),
        (
            "ppo={estimator: reinforce++, value_coef: 0, value_warmup_epochs: 0, credit: lineage, gamma_session: 0.9}",
            ["credit is lineage, which asks the critic, but estimator is reinforce++"],
        ),
        ("ppo.value_coef=0", ["ppo: estimator is gae", "value_coef is 0", "ppo.estimator=reinforce++"]),
        ("ppo.num_iterations=1", ["trains the critic alone", "ppo.num_iterations=2", "ppo.value_warmup_epochs=0"]),
        ("lora.rank=16", ["without model.path", "set model.path=MODEL, or leave lora out"]),
        ("expert=gpt", ["expert names 'gpt'", "experts has gold", "add it to experts"]),
        ("evaluate.experts=[gold,me]", ["evaluate.experts names 'me'", "experts has gold"]),
        ("task.test_groups=[pans,pans]", ["test_groups are pans, pans, expected each once"]),
        ("experts.me.kind=recorded", ["experts.me", "answers is missing"]),
        ("experts.me.kind=model", ["experts.me", "endpoint.model is missing"]),
        ("experts.me.knd=model", ["Unknown key experts.me.knd", "experts.me.kind"]),
        ("experts.me=2", ["experts.me is 2: expected a section of keys"]),
        ("experts.me.price=2", ["experts.me.price is 2", "less than or equal to 1"]),
        ("sft.stronger_model=gold", ["sft.stronger_model names 'gold'", "that is recorded or a model"]),
        ("task.name=productqa", ["task: data is missing", "task.data=DIR"]),
        # not an override at all
        ("foo", ["'foo'", "a.b=value"]),
        ("=3", ["'=3'", "a.b=value"]),
        ("task.train_groups=[a", ["'task.train_groups=[a'", "not YAML", "[a, b]"]),
    ],
)
def test_wrong_override_names_key_value_and_remedy(override: str, parts: list[str]) -> None:
    with pytest.raises(AgileError) as caught:
        load_config(None, [override])
    for part in parts:
        assert part in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.critic=separate", "ppo={estimator: reinforce++, value_coef: 0, value_warmup_epochs: 0}"],
            "model.critic is separate, .* ppo.estimator is reinforce.*set model.critic=shared",
        ),
        (["stages=[sft]", "validation.every=1"], "validation.every watch over PPO, but stages has no ppo"),
        (["stages=[sft]", "guard.min_entropy=0.1"], "guard.min_entropy"),
        (["evaluate.experts=[router]", "experts.router={kind: noisy}"], "names 'router', an agent's name"),
        (["stages=[sft]", "guard.action=rollback"], "guard.action"),
    ],
)
def test_sections_that_do_not_go_together(overrides: list[str], message: str) -> None:
    with pytest.raises(AgileError, match=message):
        load_config(None, overrides)
    load_config(None, ["stages=[sft]", "guard.max_grad_norm=1"])


def test_a_value_is_no_section(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("ppo: 3")
    with pytest.raises(AgileError, match="ppo is a value, not a section"):
        load_config(tmp_path / "c.yaml", ["ppo.lr=1"])


def test_all_problems_are_named_at_once_with_their_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("ppo: {lr: -1, clpi: 2}\nsedd: 3\n")
    with pytest.raises(AgileError) as caught:
        load_config(tmp_path / "c.yaml")
    assert str(tmp_path / "c.yaml") in str(caught.value)
    for part in ("ppo.lr is -1", "Did you mean ppo.clip?", "Did you mean seed?"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["Cannot read", "No such file"]),
        (b"a: [1\nb: 2", ["is not YAML", "line 2"]),
        (b"seed: 1\nppo: {lr: 1e-3}\nseed: 2", ["the key seed stands twice", "line 3"]),
        (b"seed: 4294967296", ["seed is 4294967296", "less than 4294967296"]),
        (b"? [a]\n: 1", ["is not YAML"]),
        (b"\xff\xfe\x00a", ["is not YAML"]),
        (b"- 1", ["holds a list", "expected a mapping"]),
        (b"just text", ["holds a str"]),
        (b"1: 2", ["Keys should be strings"]),
    ],
)
def test_unusable_file(tmp_path: Path, content: bytes | None, parts: list[str]) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AgileError) as caught:
        load_config(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


def test_shipped_configs_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("configs/paper/main.yaml"), ["task.data=x"]).sft.num_steps > 1000
    with pytest.raises(AgileError, match=r"Cannot read the config configs/none\.yaml"):
        load_config(Path("configs/none.yaml"))
    Path("configs/paper").mkdir(parents=True)
    Path("configs/paper/main.yaml").write_text("seed: 17", encoding="utf-8")
    assert load_config(Path("configs/paper/main.yaml")).seed == 17


def test_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(AgileError, match="Is a directory"):
        load_config(tmp_path)


KEYS = st.sampled_from(["seed", "ppo.lr", "task", "task.data", "evaluate.baselines", "model.path", "x.y", "", "."])


@given(st.tuples(KEYS, st.text(max_size=12)).map("=".join) | st.text(max_size=12))
def test_any_text_is_a_config_or_an_error_that_a_user_can_read(override: str) -> None:
    try:
        assert isinstance(load_config(None, [override]), RunConfig)
    except AgileError as error:
        assert str(error)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_saved_config_is_the_same_config(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["task.data=some/where", "evaluate.prices=[.1]"])
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(tmp_path / "saved.yaml") == config


def test_the_papers_main_table_trains_what_the_model_s_own_config_does() -> None:
    main, own = (
        load_config(Path(__file__).parents[1] / "configs" / name, ["task.data=some/where"])
        for name in ("paper/main.yaml", "productqa-vicuna-13b.yaml")
    )
    assert [d for d in differences(own, main) if not d.startswith("evaluate.")] == []


def test_differences_name_key_and_both_values() -> None:
    old = load_config(None, ["ppo.lr=1e-4"])
    new = load_config(None, ["ppo.lr=1e-3", "task.data=x"])
    assert differences(old, new) == ["task.data was None, is now 'x'", "ppo.lr was 0.0001, is now 0.001"]
    assert differences(old, old) == []


def test_adapters_are_swapped_where_vllm_can_hold_all_that_learns() -> None:
    lora = ["model.path=x", "lora.rank=4", "rollout.policy=vllm"]
    servers = ["rollout.policy=vllm-server", "vllm.servers=[http://h:1]", "vllm.weights_dir=d"]
    assert load_config(None, [*lora, "prompt.special_tokens=false"]).swaps_adapters
    assert not load_config(None, lora).swaps_adapters, "rows of action tokens learn"
    assert not load_config(None, [*lora, "prompt.special_tokens=false", "vllm.adapters=merge"]).swaps_adapters
    assert not load_config(None, [*lora, "prompt.special_tokens=false", *servers]).swaps_adapters
    assert not load_config(None, ["rollout.policy=vllm", "prompt.special_tokens=false"]).swaps_adapters
