"""From the desk to training and back: what people said becomes questions, examples and pairs; a run is swapped in."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from agile.build import Setup
from agile.config import RunConfig, load_config
from agile.errors import AgileError
from agile.from_desk import SESSIONS, corrected, example, imitated
from agile.policies.scripted import ScriptedPolicy
from agile.preferences import answer_decision
from agile.serve import accounts, deployments, questions, requests
from agile.serve.database import Database, database_url
from agile.serve.export import Word, from_desk_config, truth
from agile.serve.runner import Runner, Served
from agile.serve.server import load_served, make_app, served_config
from agile.tasks.desk import QUESTIONS, DeskTask
from agile.types import Action, Fn, SessionStatus, Stream
from tests.serve.desk import ENCODER, PASSWORD, PEOPLE, Counted, Running, asks_once, open_desk, running, until
from tests.serve.desk import served as scripted
from tests.tiny import agile
from tests.worlds import Echo, item, make_codec, make_executor, play, script


def test_what_is_right_is_the_newest_word_that_nobody_took_back() -> None:
    def said(*words: tuple[float, str, bool]) -> str | None:
        found = truth({("p1", "q"): [Word(at, answer, right, "review", "ann") for at, answer, right in words]})
        return found[("p1", "q")].answer if found else None

    assert said((1, "yes", True), (2, "no", True)) == "no"
    assert said((2, "no", True), (1, "yes", True)) == "no"
    assert said((1, "yes", True), (2, "Yes", False)) is None
    assert said((1, "yes", True), (2, "no", False)) == "yes"
    assert said((1, "no", False)) is None


def test_a_wrong_answer_is_replaced_token_by_token() -> None:
    executor = make_executor()
    codec = executor.codec
    own = play(executor, script(codec, Action("PredictAnswer", "no")))
    assert example(own, " NO ", codec) is own
    found = example(own, "yes", codec)
    assert not isinstance(found, str) and found.answer == "yes"
    decision, before = answer_decision(found, codec), answer_decision(own, codec)
    assert decision is not None and before is not None and decision.context == before.context
    assert decision.written == codec.encode_action(Action("PredictAnswer", "yes"))
    (old,), (new,) = own.segments, found.segments
    assert [s.source for s in old.spans] == [s.source for s in new.spans] and new.end == old.end
    assert sum(new.action_mask) == len(decision.written)

    told = play(
        executor, script(codec, Action("SeekAdvice"), Action("Reflection", "none"), Action("PredictAnswer", "no"))
    )
    assert example(told, "no", codec) is told and example(told, "yes", codec) == "advised otherwise"
    repeated = corrected(told, "yes", codec)
    assert repeated is not None and answer_decision(repeated, codec).named, "its name was written by the executor"  # type: ignore[union-attr]
    searched = play(executor, script(codec, Action("SearchProduct", "SELECT 1"), Action("PredictAnswer", "no")))
    assert example(searched, "yes", codec) == "searched"
    assert example(replace(own, status=SessionStatus.FAILED), "no", codec) == "failed"
    assert example(own, "no", make_codec("word")) == "of another tokenizer"


def test_questions_of_the_desk_are_a_task(tmp_path: Path) -> None:
    class Shop:
        tools = {"SearchProduct": Echo()}  # noqa: RUF012
        skipped = ()

        def streams(self, split: str) -> tuple[Stream, ...]:
            return (Stream(split, (item(),)),)

        def is_correct(self, asked: object, answer: str | None, used_search: bool) -> bool:
            return answer == "of the shop"

    path = tmp_path / QUESTIONS
    rows = [
        {"id": f"served/{n}", "question": "q ?", "answer": "Yes", "group": group, "product": "p1", "context": {}}
        for n, group in enumerate("aabab")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = DeskTask(path, Shop(), stream_length=2)  # type: ignore[arg-type]
    streams = task.streams("train")
    assert [(s.id, [i.id for i in s.items]) for s in streams] == [
        ("served-a-0", ["served/0", "served/1"]),
        ("served-a-1", ["served/3"]),
        ("served-b-0", ["served/2", "served/4"]),
    ]
    assert streams[0].progress(1) == 0.0 and Stream("s", (item(), item())).progress(1) == 0.5
    asked = streams[0].items[0]
    assert task.is_correct(asked, " yes", False) and not task.is_correct(asked, None, False)
    assert task.is_correct(item(), "of the shop", False) and task.streams("test")[0].id == "test"
    assert list(task.tools) == ["SearchProduct"] and task.tool_answer(asked) is None


# --------------------------------------------------------------------------------------------------------------------
# A server of a run


def guesses(context: str) -> Action:
    """Ask where it is about weight, else say yes."""
    if context.rstrip().endswith("[Reflection]"):
        return Action(Fn.REFLECTION, "none")
    if "answer:" in context:
        return Action(Fn.PREDICT_ANSWER, context.rsplit("answer:", 1)[1].split()[0])
    return Action(Fn.SEEK_ADVICE) if "question: is it heavy" in context else Action(Fn.PREDICT_ANSWER, "yes")


@contextmanager
def serving(made: Path, out: Path) -> Iterator[tuple[Running, RunConfig]]:
    """A server of the run's tokenizer and shop, whose decisions are scripted."""
    path = out.parent / "serve.yaml"
    path.write_text(f"serve: {{run: {made}, wait_s: 20}}\n")
    config = served_config(path, ())
    out.mkdir(exist_ok=True)
    (out / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    database = Database(database_url(None, out))
    if not accounts.users(database):
        for name, role in PEOPLE.items():
            accounts.add_user(database, name, role, PASSWORD)
    first = deployments.starting(database, made, "sft")
    deployments.settle(database, first.id)

    def load(number: int) -> Served:
        deployed = deployments.by_id(database, number)
        assert deployed is not None
        _, served = load_served(served_config(path, (), Path(deployed.run)), made, deployed)
        return replace(served, policy=ScriptedPolicy(served.executor.codec, guesses))

    app = make_app(config, out, database, load(first.id), ENCODER, load=load)
    with running(app) as server:
        yield server, config


def ask(server: Running, question: str, product: str) -> str:
    body = {"model": f"agile/{product}", "messages": [{"role": "user", "content": question}]}
    said = httpx2.post(f"{server.url}/v1/chat/completions", json=body, headers=server.key(), timeout=30).json()
    return str(said["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def desk(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a server of which people asked and said much, and the run."""
    out = tmp_path_factory.mktemp("desk") / "serve"
    with serving(made, out) as (server, _):
        ann = server.person("ann")
        products = list(server.app.state.desk.runner.served.products)
        for question in ("is it washable ?", "is it foldable ?", "is it toxic ?"):
            for product in products[:2]:
                assert ask(server, question, product) == "yes"
        asking = threading.Thread(target=ask, args=(server, "is it heavy ?", products[0]))
        asking.start()
        ann.answers("no", "it is made of wood")
        asking.join(30)
        verdicts = ("right", "right", "corrected", "wrong", "corrected")
        for n, verdict in enumerate(verdicts, 1):
            (question_id,) = [a.id for a in questions.newest(server.database) if a.number == n]
            ann.send(f"/desk/review/{question_id}", verdict=verdict, key=f"k{n}", answer="no" if n in (3, 5) else "")
    return out, made


def test_what_people_said_becomes_questions_and_examples(desk: tuple[Path, Path], tmp_path: Path) -> None:
    out, made = desk
    config = from_desk_config(load_config(None, [f"task.desk.served={out}", "sft.num_steps=3"]))
    assert config.sft.num_steps == 3 and config.model.hidden_size == 32 and config.ppo.num_iterations == 1
    assert config.model.path == str(made / "sft") and config.task.data == made / "minishop"
    setup = Setup(config, tmp_path)
    (stream,) = setup.task.streams("train")
    assert [(i.question, i.answer) for i in stream.items] == [
        ("is it washable ?", "yes"),
        ("is it washable ?", "yes"),
        ("is it foldable ?", "no"),
        ("is it toxic ?", "no"),
        ("is it heavy ?", "no"),
    ], "of the fourth and sixth nobody knows"
    assert stream.items[-1].context["long_answer"] == "it is made of wood"
    executor = setup.executor(setup.tokenizer())
    sessions, counts = imitated(tmp_path / SESSIONS, executor.codec)
    assert counts == {"right": 3, "corrected": 2}
    assert [s.answer for s in sessions] == ["yes", "yes", "no", "no", "no"]
    assert [s.advised for s in sessions] == [False] * 4 + [True]
    assert setup.imitation_rows(executor)

    for change, said in (
        (["task.desk.until=2020-01-01"], "nobody answered or reviewed a question in that time"),
        ([f"task.desk.served={tmp_path}"], "no folder of agile serve"),
    ):
        with pytest.raises(AgileError, match=said):
            other = load_config(None, [f"task.desk.served={out}", *change])
            Setup(from_desk_config(other), tmp_path / "other").task.streams("train")


@pytest.mark.slow
def test_another_agent_is_swapped_in_and_back(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr("agile.serve.app.SWAP_LOOK_S", 0.05)
    monkeypatch.setattr("agile.serve.swap.LOOK_S", 0.05)
    other, out = tmp_path / "other", tmp_path / "serve"
    shutil.copytree(made, other)
    words: tuple[str | Path, ...] = (tmp_path / "serve.yaml", f"out={out}")
    with serving(made, out) as (server, _):
        runner: Runner = server.app.state.desk.runner
        first, product = runner.served, next(iter(runner.served.products))
        waiting: list[str] = []
        asking = threading.Thread(target=lambda: waiting.append(ask(server, "is it heavy ?", product)))
        asking.start()
        until(lambda: requests.num_waiting(server.database) or None)

        swapped = agile("serve-swap", other, *words)
        assert swapped.exit_code == 0 and "other/sft is served" in " ".join(swapped.output.split())
        assert runner.served is not first and ask(server, "is it washable ?", product) == "yes"
        server.person("ann").answers("no")
        asking.join(30)
        assert waiting == ["no"] and not runner._busy[first], "it ended with the agent that it began with"
        assert [deployment_of(server, n) for n in (1, 2)] == [1, 2]

        (other / "sft" / "tokenizer.json").unlink()
        broken = agile("serve-swap", other, *words)
        assert broken.exit_code == 2 and "goes on with what it served" in " ".join(broken.output.split())
        assert ask(server, "is it foldable ?", product) == "yes" and deployment_of(server, 3) == 2
        back = agile("serve-swap", "--back", *words)
        assert f"{made}/sft is served" in back.output.replace("\n", "")
    database = Database(database_url(None, out))
    last = deployments.starting(database, made, "sft")
    assert (last.run, last.by != "config") == (str(made.resolve()), True), "a restart serves the same"
    assert deployments.starting(database, other, "sft").by == "config", "a config that says something new holds"
    none = agile("serve-swap", made, *words, "--wait", "0")
    assert "No server has taken" in none.output
    for wrong, said in (((), "expected one run"), ((tmp_path / "nothing",), "no trained agent")):
        result = agile("serve-swap", *wrong, *words)
        assert result.exit_code == 2 and said in " ".join(result.output.split())


def deployment_of(server: Running, number: int) -> int | None:
    (asked,) = [q for q in questions.newest(server.database) if q.number == number]
    found = questions.by_id(server.database, asked.id)
    return None if found is None else found.deployment


def test_a_session_goes_on_after_a_restart_with_the_agent_that_began_it(tmp_path: Path) -> None:
    database = open_desk(tmp_path)
    first = deployments.deploy(database, tmp_path, "a", "me").id

    def agent(number: int, policy: Counted | None = None) -> Served:
        return replace(scripted(policy or Counted(asks_once)), deployment=number)

    def an_app(number: int, load: Callable[[int], Served] = agent) -> object:
        config = RunConfig.model_validate({"serve": {"wait_s": 0}})
        return make_app(config, tmp_path, database, agent(number), ENCODER, load=load)

    with running(an_app(first)) as server:  # type: ignore[arg-type]
        ask(server, "is it warm ?", "p1")
        until(lambda: requests.num_waiting(database) or None)
    second, loaded = deployments.deploy(database, tmp_path, "b", "me").id, []

    def load(number: int) -> Served:
        loaded.append(number)
        return agent(number)

    with running(an_app(second, load)) as server:  # type: ignore[arg-type]
        assert loaded == [first] and server.app.state.desk.runner.served.deployment == second
        server.person("ann").answers("yes")
        until(lambda: (questions.newest(database)[0].status == "answered") or None)


# --------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.slow
def test_a_run_from_the_desk_trains_and_is_served(desk: tuple[Path, Path], tmp_path: Path) -> None:
    out, made = desk
    config = Path(__file__).parents[2] / "configs" / "from-desk.yaml"
    run = tmp_path / "from-desk"
    words = ("sft.num_steps=2", "sft.warmup_steps=1", "ppo.num_iterations=2", "ppo.rollouts_per_stream=2")
    result = agile("train", config, f"task.desk.served={out}", f"out={run}", *words, "rollout.max_failed=1.0")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "5 questions of" in said and "Sessions to imitate: 5 (3 right, 2 corrected)" in said
    assert (run / "ppo" / "config.json").exists()
    assert load_config(run / "config.yaml").task.desk is not None
    pairs = agile("preferences", run)
    assert pairs.exit_code == 0, pairs.output
    lines = [json.loads(line) for line in (run / "preferences.jsonl").read_text().splitlines()]
    assert {"served/3", "served/5"} <= {line["session"] for line in lines}
    assert agile("replay", run).exit_code == 0
    path = tmp_path / "serve.yaml"
    path.write_text(f"serve: {{run: {made}}}\n")
    deployed = deployments.deploy(Database(database_url(None, tmp_path)), run, "ppo", "me")
    _, served = load_served(served_config(path, (), run), made, deployed)
    assert served.products and served.checkpoint == "ppo"
