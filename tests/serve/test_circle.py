"""The circle of `benchmarks/circle.py`, on next to nothing: serve, ask, review, train, swap, ask again."""

from __future__ import annotations

from pathlib import Path

import pytest

from agile.serve import deployments
from agile.serve.database import Database
from agile.tasks.minishop import write_minishop
from benchmarks.circle import SHOP, circle, questions_of, two_halves
from tests.tiny import TinyRun


def test_the_halves_are_about_other_products(tmp_path: Path) -> None:
    write_minishop(tmp_path / "shop", SHOP, 1000)
    known = questions_of(tmp_path / "shop")
    first, second = two_halves(known, 300)
    assert len(first) == len(second) == 300
    assert len({q.product for q in first}) == len({q.product for q in second}) == 6
    assert not {q.product for q in first} & {q.product for q in second}
    assert known[0].is_right(f" {known[0].answer.upper()}")


@pytest.mark.slow
def test_the_circle_closes(tiny_run: TinyRun, tmp_path: Path) -> None:
    # without imitation: the words of this shop are not among those of the tiny agent
    quick = ("sft.num_steps=0", "ppo.num_iterations=2", "ppo.rollouts_per_stream=2")
    overrides = (*quick, "rollout.max_failed=1.0")
    found = circle(tiny_run.path, tmp_path, agent="sft", number=20, seed=1, overrides=overrides)
    assert [found[phase]["questions"] for phase in ("before", "control", "after")] == [20, 20, 20]
    database = Database(f"sqlite:///{tmp_path / 'serve' / 'desk.sqlite'}")
    now, then = deployments.newest(database), deployments.before(database)
    assert now is not None and then is not None
    assert (Path(now.run).name, Path(then.run).name) == (tiny_run.path.name, "from-desk"), "swapped, and back again"
