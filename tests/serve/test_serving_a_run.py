"""From a run folder to a server, accounts on the command line, and the desk as an expert of a config."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx2
import pytest

from agile.build import Setup
from agile.config import load_config
from agile.errors import AgileError
from agile.extras import needs
from agile.serve import accounts, questions
from agile.serve.advisor import DeskAdvisor
from agile.serve.database import Database, database_url
from agile.serve.server import load_served, make_app, run_server, served_config, similar_by
from tests.serve.desk import ENCODER, PASSWORD, Running, running, until
from tests.tiny import agile


def config_file(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text)
    return path


def test_a_run_is_served_and_its_sessions_are_shown(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = config_file(tmp_path, f"serve: {{run: {made}, wait_s: 30}}\nrollout: {{max_action_tokens: 5}}\n")
    config = served_config(path, ["serve.model=shop"])
    assert config.rollout.max_action_tokens == 5 and config.model.hidden_size == 32, "the run's, but for what is given"
    assert config.task.num_train_worlds == 3

    assert agile("serve-user", "add", "cust", "--password", PASSWORD, path, f"out={out}").exit_code == 0
    key = agile("serve-user", "key", "cust", path, f"out={out}").output.strip()
    listed = agile("serve-user", "list", path, f"out={out}")
    assert listed.output.split() == ["cust", "user"]
    twice = agile("serve-user", "add", "cust", "--password", PASSWORD, path, f"out={out}")
    assert twice.exit_code == 2 and "already" in twice.output

    setup, served = load_served(config, made)
    database = Database(database_url(None, out))
    with running(make_app(config, out, database, served, setup.encoder)) as server:
        product = next(iter(served.products))
        body = {"model": f"shop/{product}", "messages": [{"role": "user", "content": "is it heavy ?"}]}
        url, headers = f"{server.url}/v1/chat/completions", {"authorization": f"Bearer {key}"}
        assert httpx2.post(url, json=body, headers=headers, timeout=60).status_code == 200
        until(lambda: settled(server))


def settled(server: Running) -> bool | None:
    """Random weights ask, answer or end in nothing: whatever they do is kept."""
    (asked,) = questions.newest(server.database)
    return asked.status in ("answered", "failed", "waiting") or None


def test_what_cannot_be_served(made: Path, tmp_path: Path) -> None:
    for text, said in (
        ("serve: {}", "serve.run=RUN"),
        (f"serve: {{run: {tmp_path}}}", "no trained agent"),
        (f"serve: {{run: {made}, fallback: nobody}}", "serve.fallback names 'nobody'"),
    ):
        with pytest.raises(AgileError, match=said):
            served_config(config_file(tmp_path, text), ())
    with pytest.raises(AgileError, match="has no agent dpo"):
        load_served(served_config(config_file(tmp_path, f"serve: {{run: {made}, agent: dpo}}"), ()), made)
    half = agile("serve", config_file(tmp_path, "serve: {}"), "--tls-cert", "x.pem")
    assert half.exit_code == 2 and "--tls-key" in half.output
    from rich.console import Console

    files = (tmp_path / "no.pem", tmp_path / "no.key")
    with pytest.raises(AgileError, match=r"no\.pem"):
        run_server(tmp_path / "x.yaml", (), tmp_path, Console(), host="0.0.0.0", port=1, tls=files)


def test_the_desk_is_an_expert_of_a_config(made: Path, tmp_path: Path) -> None:
    desk = {"kind": "desk", "database": f"sqlite:///{tmp_path / 'desk.sqlite'}", "timeout_s": 5, "fallback": "gold"}
    words = ", ".join(f"{name}: {value}" for name, value in desk.items())
    config = load_config(made / "config.yaml", [f"experts={{people: {{{words}}}}}", "expert=people"])
    advisor = Setup(config, made).advisor()
    assert isinstance(advisor, DeskAdvisor) and advisor.timeout_s == 5 and advisor.fallback is not None
    for change, said in (
        ("experts.people.database=null", "database is missing"),
        ("experts.people.timeout_s=null", "max_stage_s"),
        ("experts.people.fallback=nobody", "fallback names 'nobody'"),
        ("experts.people.scope=served", "the server's own"),
    ):
        with pytest.raises(AgileError, match=said):
            load_config(made / "config.yaml", [f"experts={{people: {{{words}}}}}", change])


def test_similar_questions_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    similar = similar_by(ENCODER, 0.9)
    assert similar is not None and similar("is it warm", ["how long is it", "is it warm"]) == 1
    assert similar("is it warm", ["what does it weigh"]) is None and similar_by(ENCODER, 1.0) is None
    monkeypatch.setitem(sys.modules, "argon2", None)
    with pytest.raises(AgileError, match=r"pip install 'agile-agents\[serve\]'"), needs("serve"):
        import argon2  # noqa: F401
    assert accounts.ROLES[-1] == "administrator"


def test_a_database_that_is_none(tmp_path: Path) -> None:
    for url, said in (("nonsense", "sqlite:///FILE"), (f"sqlite:///{tmp_path}", "cannot be used")):
        with pytest.raises(AgileError, match=said):
            Database(url)
