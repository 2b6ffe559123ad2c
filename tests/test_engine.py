"""DeepSpeed steps as plain torch does, and what it saves is all there is."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import resource
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agile import ranks
from agile.batching import make_batch
from agile.engine import Engine
from agile.errors import AgileError
from agile.train.sft import sft_schedule
from tests.doors import actor_critic, largest_difference, random_rows, weights

SCHEDULE = sft_schedule(6, 2)


def net(seed: int = 0, size: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, size), nn.Tanh(), nn.Linear(size, 1))


def micro_batches(step: int) -> list[Tensor]:
    """Three of different sizes; their losses are sums, so that they add up."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(n, 3, generator=generator) for n in (4, 1, 2)]


def train(engine: Engine, steps: Sequence[int]) -> tuple[list[float], list[float]]:
    """Gradient norms and learning rates of the steps."""
    norms, rates = [], []
    for step in steps:
        batches = micro_batches(step)
        for x in batches:
            out = engine.forward(x.to(getattr(torch, engine.dtype))).float()
            engine.backward((out - x[:, :1]).square().sum(), last=x is batches[-1])
        norms.append(engine.step())
        rates.append(engine.lr)
    return norms, rates


def groups(module: nn.Module) -> list[dict[str, object]]:
    first, *rest = module.children()
    return [
        {"params": list(first.parameters())},
        {"params": [p for m in rest for p in m.parameters()], "lr": 0.3},
    ]


LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    **{f"zero-{stage}": {"zero_stage": stage} for stage in (1, 2, 3)},
    "zero-2-offload": {"zero_stage": 2, "offload": "optimizer"},
    "zero-3-offload": {"zero_stage": 3, "offload": "all"},
    "bfloat16": {"zero_stage": 1, "dtype": "bfloat16"},
    "bfloat16-offload": {"zero_stage": 3, "dtype": "bfloat16", "offload": "all"},
}
QUICK = ("plain", "zero-1", "zero-2", "zero-3")
LAYOUT = pytest.mark.parametrize(
    "layout",
    [pytest.param(x, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, x in LAYOUTS.items()],
)


@LAYOUT
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e6], ids=["clipped", "free"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_plain_adamw_with_clipping(
    max_grad_norm: float, weight_decay: float, layout: dict[str, Any]
) -> None:
    module = net()
    plain = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(groups(plain), lr=0.1, betas=(0.9, 0.95), weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULE)
    engine = Engine(
        module,
        lr=0.1,
        groups=groups(module),
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        schedule=SCHEDULE,
        **layout,
    )
    # eight bits of a number, and Adam's first steps are as large for a small gradient as for a large one
    exact, near = (1e-5, 1e-6) if engine.dtype == "float32" else (0.02, 0.02)
    norms, rates = train(engine, range(3))
    for step in range(3):
        for x in micro_batches(step):
            (plain(x) - x[:, :1]).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm)
        assert norms[step] == pytest.approx(float(norm), rel=exact)
        assert norm > 0.5, "the test needs clipping"
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    found = {name: weight.float().clone() for name, weight in engine.weights("")}
    assert largest_difference(found, weights(plain)) < near
    assert largest_difference(found, weights(net())) > 0.1
    assert rates == pytest.approx([0.05, 0.1, 0.1])


def test_the_schedule_scales_every_group() -> None:
    module = net()
    engine = Engine(module, lr=0.1, groups=groups(module), schedule=SCHEDULE)
    _, rates = train(engine, range(7))
    assert rates == pytest.approx([0.1 * SCHEDULE(i) for i in range(7)])
    assert [g["lr"] for g in engine.optimizer.param_groups] == pytest.approx([0.1 * SCHEDULE(7), 0.3 * SCHEDULE(7)])


def test_a_scale_holds_from_the_next_step_on_for_every_group() -> None:
    module = net()
    engine = Engine(module, lr=0.1, groups=groups(module), schedule=lambda step: 1 / (1 + step))
    train(engine, [0])
    engine.scale_lr(0.5)
    assert [g["lr"] for g in engine.optimizer.param_groups] == pytest.approx([0.1 / 4, 0.3 / 4])
    engine.scale_lr(0.2)  # of every learning rate, not of what it was scaled to
    assert train(engine, range(1, 3))[1] == pytest.approx([0.02 / 2, 0.02 / 3])


def test_parameters_out_of_the_groups_stay() -> None:
    module = net()
    before = weights(module)
    engine = Engine(module, lr=0.1, groups=groups(module)[:1], weight_decay=0.5)
    train(engine, range(2))
    moved = {name for name, value in weights(module).items() if not torch.equal(value, before[name])}
    assert moved == {"0.weight", "0.bias"}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_schedule_counts_skipped_steps(zero_stage: int) -> None:
    engine = Engine(net(), lr=0.1, zero_stage=zero_stage, skip_above=1e6, schedule=lambda step: 1 / (1 + step))
    rates = []
    for factor in (1.0, float("nan"), 1e9, float("inf"), 1.0):
        engine.backward((engine.forward(micro_batches(1)[0]) * factor).sum(), last=True)
        engine.step()
        rates.append(engine.lr)
    assert engine.num_skipped == 3
    assert rates == pytest.approx([0.1, 0.1 / 2, 0.1 / 3, 0.1 / 4, 0.1 / 5])


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_a_bad_step_changes_nothing_and_is_counted(zero_stage: int, bad: float, tmp_path: Path) -> None:
    """Not weights, not momentum, not AdamW's count: the next step is that of an engine that never saw it."""

    def make() -> Engine:
        return Engine(net(), lr=0.1, weight_decay=0.1, zero_stage=zero_stage, skip_above=1e6)

    engine, other = make(), make()
    train(engine, [0])
    before = weights(engine.module)
    engine.backward((engine.forward(micro_batches(1)[0]) * bad).sum(), last=True)
    engine.step()
    assert engine.num_skipped == 1
    assert largest_difference(weights(engine.module), before) == 0
    train(engine, [2])
    train(other, [0, 2])
    assert engine.num_skipped == 1
    assert largest_difference(weights(engine.module), weights(other.module)) == 0
    engine.save(tmp_path, "counted")
    other.load(tmp_path, "counted")
    assert other.num_skipped == 1


def test_too_many_bad_steps_end_the_run() -> None:
    engine = Engine(net(), lr=0.1, skip_above=1e-9, max_skipped=2)
    train(engine, [0])
    with pytest.raises(AgileError, match=r"2 optimizer steps in a row were skipped .*guard.max_grad_norm.*--resume"):
        train(engine, [1])


def test_bad_steps_with_a_good_one_between_do_not_end_it() -> None:
    engine = Engine(net(), lr=0.1, max_skipped=2)
    for factor in (math.nan, 1.0, math.nan, 1.0):
        engine.backward((engine.forward(micro_batches(1)[0]) * factor).sum(), last=True)
        engine.step()
    assert engine.num_skipped == 2


@LAYOUT
def test_a_restored_engine_goes_on_bit_for_bit(layout: dict[str, Any], tmp_path: Path) -> None:
    """A new one, and one that trained on and is rolled back."""

    def make(seed: int) -> Engine:
        module = net(seed)
        return Engine(module, lr=0.1, groups=groups(module), weight_decay=0.1, schedule=SCHEDULE, **layout)

    engine = make(0)
    train(engine, range(3))
    engine.save(tmp_path, "three")
    expected = train(engine, range(3, 6))
    learned = {name: weight.clone() for name, weight in engine.weights("")}
    for restored in (make(1), engine):
        restored.load(tmp_path, "three")
        assert train(restored, range(3, 6)) == expected
        assert all(torch.equal(weight, learned[name]) for name, weight in restored.weights(""))


def test_zero_warns_of_nothing_at_every_step(recwarn: pytest.WarningsRecorder) -> None:
    train(Engine(net(), lr=0.1, zero_stage=3), range(2))
    assert not [found for found in recwarn if found.category is FutureWarning]


@pytest.mark.parametrize("layout", [{}, {"zero_stage": 3}], ids=["plain", "zero-3"])
def test_gradient_checkpointing_computes_layers_twice_and_learns_the_same(layout: dict[str, Any]) -> None:
    batch = make_batch(random_rows(4), torch.device("cpu"))

    def learned(*, checkpointing: bool) -> tuple[int, list[float], dict[str, Tensor]]:
        """How often a layer was computed, norms and weights."""
        model = actor_critic(num_layers=2)
        engine = Engine(model, lr=0.01, gradient_checkpointing=checkpointing, **layout)
        calls, norms = [], []
        model.lm.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
        for _ in range(3):
            engine.backward(sum(out.square().sum() for out in engine.forward(batch)), last=True)
            norms.append(engine.step())
        with torch.no_grad():
            engine.forward(batch)
        return len(calls), norms, {name: weight.clone() for name, weight in engine.weights("lm.")}

    once, twice = learned(checkpointing=False), learned(checkpointing=True)
    assert (once[0], twice[0]) == (3 + 1, 2 * 3 + 1)
    assert twice[1] == pytest.approx(once[1], rel=1e-6)
    assert largest_difference(once[2], twice[2]) < 1e-6


def test_a_checkpoint_of_another_shape_is_refused_and_named(tmp_path: Path) -> None:
    Engine(net(), lr=0.1).save(tmp_path, "mine")
    with pytest.raises(AgileError, match=f"{tmp_path}/mine .*does not fit.* size mismatch for 0.weight"):
        Engine(net(size=6), lr=0.1).load(tmp_path, "mine")
    module = net()
    with pytest.raises(AgileError, match=r"does not fit .* number of parameter groups"):
        Engine(module, lr=0.1, groups=groups(module)).load(tmp_path, "mine")
    with pytest.raises(AgileError, match=f"no checkpoint yours in {tmp_path}"):
        Engine(net(), lr=0.1).load(tmp_path, "yours")


@pytest.mark.parametrize(
    ("name", "value", "how", "remedy"),
    [
        ("processes", 4, "by 4 processes", "nproc-per-node=4"),
        ("zero_stage", 2, "with engine.zero_stage=2", "engine.zero_stage=2"),
        ("dtype", "bfloat16", "with engine.dtype=bfloat16", "engine.dtype=bfloat16"),
    ],
)
def test_a_checkpoint_of_another_layout_is_refused(
    tmp_path: Path, name: str, value: object, how: str, remedy: str
) -> None:
    engine = Engine(net(), lr=0.1)
    engine.save(tmp_path, "mine")
    layout = tmp_path / "mine.json"
    layout.write_text(json.dumps({**json.loads(layout.read_text()), name: value}))
    with pytest.raises(AgileError, match=f"written {how}.*{remedy}"):
        engine.load(tmp_path, "mine")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_torn_checkpoint_is_refused(tmp_path: Path, kept: float) -> None:
    engine = Engine(net(), lr=0.1)
    engine.save(tmp_path, "mine")
    (file,) = (tmp_path / "mine").iterdir()
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(AgileError, match="is damaged or does not fit"):
        engine.load(tmp_path, "mine")


def test_a_torn_layout_is_refused_with_the_folder_to_remove(tmp_path: Path) -> None:
    engine = Engine(net(), lr=0.1)
    engine.save(tmp_path, "mine")
    (tmp_path / "mine.json").write_text('{"proc')
    with pytest.raises(AgileError, match=rf"mine\.json is damaged.* you have removed {tmp_path}\."):
        engine.load(tmp_path, "mine")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As if the disk were full after `size` bytes of each file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_operating_system_error(tmp_path: Path) -> None:
    engine = Engine(net(), lr=0.1)
    with pytest.raises(OSError, match="checkpoint was not written"), largest_file(1000):
        engine.save(tmp_path, "mine")


@pytest.mark.skipif("RANK" in os.environ, reason="a launcher gave this process its port")
def test_a_run_without_a_launcher_takes_no_port() -> None:
    """A port in the environment would be handed on to programs that this one starts, and they would fight over it."""
    Engine(net(), lr=0.1)
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & os.environ.keys()


def test_a_closed_engine_lets_go_of_its_module() -> None:
    module = net()
    engine = Engine(module, lr=0.1)
    train(engine, [0])
    moments = weakref.ref(next(iter(engine.optimizer.state.values()))["exp_avg"])
    engine.close()
    del engine
    gc.collect()
    assert moments() is None
    other = Engine(module, lr=0.1)
    assert len(train(other, [1])[0]) == 1


# --------------------------------------------------------------------------------------------------------------------
# The weights that rollout engines are given


class Actor(nn.Module):
    """A model whose output embedding is its input embedding, and a head of the trainer's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lm = nn.Module()
        self.lm.embed = nn.Embedding(7, 4)
        self.lm.inner = nn.Linear(4, 4)
        self.lm.head = nn.Linear(4, 7, bias=False)
        self.lm.head.weight = self.lm.embed.weight
        self.value_head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        embed, inner, head = (self.lm.get_submodule(n) for n in ("embed", "inner", "head"))
        hidden = inner(embed(x)).tanh()
        out: Tensor = head(hidden).log_softmax(-1)[:, 0] + self.value_head(hidden).squeeze(-1)
        return out


ACTOR_NAMES = ["embed.weight", "inner.weight", "inner.bias", "head.weight"]


def trained_actor(stage: int) -> dict[str, Tensor]:
    """What the engine gives out after two steps, and the norms of their gradients."""
    engine = Engine(Actor(), lr=0.1, max_grad_norm=0.5, zero_stage=stage)
    norms = []
    for _ in range(2):
        own = torch.arange(7)[ranks.rank() :: ranks.world_size()]
        engine.backward(engine.forward(own).square().sum(), last=True)
        norms.append(engine.step())
    found = {name: tensor.clone() for name, tensor in engine.weights()}
    assert list(found) == ACTOR_NAMES
    assert torch.equal(found["embed.weight"], found["head.weight"])
    return {**found, "norms": torch.tensor(norms)}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_are_full_under_every_stage_of_zero(stage: int) -> None:
    expected = trained_actor(0)
    assert not torch.equal(expected["inner.weight"], Actor().lm.get_parameter("inner.weight"))
    found = trained_actor(stage)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_process_gets_full_weights(stage: int, tmp_path: Path) -> None:
    """Two processes that learn from a share of each batch learn what one does."""
    program = (
        "import os, sys, torch; from tests.test_engine import trained_actor\n"
        "torch.save(trained_actor(int(sys.argv[1])), f'{sys.argv[2]}/{os.environ[\"RANK\"]}.pt')"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command = [*launcher, sys.executable, "-c", program, str(stage), str(tmp_path)]
    root = Path(__file__).parents[1]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, cwd=root, check=True, timeout=600)
    expected = trained_actor(0)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{rank} {name}")
