from collections.abc import Iterator
from pathlib import Path

import pytest

from agile.learner import Learner
from tests.gateway.agents import make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def shared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learner]:
    with Learner(tmp_path_factory.mktemp("shared") / "run", model=str(model), ppo={"kl_coef": 0.0}) as learner:
        yield learner


@pytest.fixture
def learner(shared: Learner) -> Iterator[Learner]:
    """A learner whose policy a test may replace."""
    policy = shared.policy
    yield shared
    shared.policy = policy
