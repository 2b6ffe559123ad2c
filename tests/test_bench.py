"""`agile bench`: the report of a run, and what it refuses before it plays anything."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from agile.bench import _along_stream, _report, bench
from agile.config import RunConfig, load_config
from agile.errors import AgileError
from agile.evaluate import Outcome
from agile.measure import Measured
from agile.published import GROUPS
from agile.session_log import read_lines, session_from_json
from agile.tasks.minishop import MiniShopSpec, write_minishop
from agile.tasks.productqa import ProductQA
from agile.tokens import build_tokenizer
from agile.types import AgentSpec, Stream
from tests.tiny import TinyRun, agile

BASELINES = ["always_ask", "never_ask", "router", "recall", "calibrated_recall", "oracle"]


@pytest.fixture
def run(tiny_run: TinyRun, tmp_path: Path) -> Path:
    """A copy of the tiny run, to change."""
    return shutil.copytree(tiny_run.path, tmp_path / "run")


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only figures: plots have tests of their own and take seconds."""
    monkeypatch.setattr("agile.bench.write_report", lambda report, out: None)
    monkeypatch.setattr("agile.bench.save_plots", lambda report, out: None)


def config_of(run: Path, *overrides: str) -> RunConfig:
    return load_config(run / "config.yaml", overrides)


def files(path: Path) -> set[str]:
    return {f.relative_to(path).as_posix() for f in path.rglob("*") if f.name != ".lock"}


# --------------------------------------------------------------------------------------------------------------------
# The report


@pytest.mark.parametrize(("skipped", "same"), [([], True), (["qa.jsonl, line 1: bad"], False)])
def test_published_figures_are_about_other_questions_where_rows_were_left_out(skipped: list[str], same: bool) -> None:
    config = load_config(None, ["task.name=productqa", "task.data=x"])
    played = {"router": [Outcome(f"{g}/0", g, 0, 1, "fact", True, False) for g in GROUPS]}
    report = _report(config, Measured(True, GROUPS, results=played, skipped_rows=skipped), 0.0)
    means = [row for row in report["published"] if row["groups"] == list(GROUPS)]
    assert means and {row["same_questions"] for row in means} == {same}


def test_report_of_a_run(tiny_run: TinyRun) -> None:
    report = json.loads((tiny_run.path / "report.json").read_text())
    assert list(report["agents"]) == ["sft", "ppo", *BASELINES]
    for name, agent in report["agents"].items():
        learned = name in ("sft", "ppo")
        assert ("usage" in agent) == ("clears_envelope" in agent) == learned
        assert set(agent) - {"usage", "clears_envelope"} == {
            *("accuracy", "advice_rate", "score", "score_ci", "n", "failed", "by_type", "by_position", "expert_calls"),
            *("seconds", "means"),
        }
        assert agent["seconds"] > 0 and agent["means"]["macro"]["score"] == pytest.approx(agent["score"])
        assert agent["n"] == 16
        assert agent["score"] == pytest.approx(agent["accuracy"] - 0.3 * agent["advice_rate"])
    assert report["agents"]["ppo"]["usage"]["completion_tokens"] > 0 == report["agents"]["ppo"]["usage"]["cost"]
    assert report["agents"]["always_ask"]["score"] == pytest.approx(0.7)
    order = ["ppo", "sft", *BASELINES]  # the agent that the report is about, then every other pair
    assert [(c["a"], c["b"]) for c in report["comparisons"]] == list(combinations(order, 2))
    assert [row["iteration"] for row in report["training"] if "iteration" in row] == [1]
    assert [row["step"] for row in report["training"] if "loss" in row and "iteration" not in row] == [10]
    assert report["seconds"]["total"] > 0
    assert (tiny_run.path / "report.html").stat().st_size > (tiny_run.path / "report.json").stat().st_size


def test_sessions_are_kept_and_agree_with_the_report(tiny_run: TinyRun) -> None:
    report = json.loads((tiny_run.path / "report.json").read_text())
    for name in ("sft", "ppo"):
        rows = list(read_lines(tiny_run.path / f"test-{name}.jsonl"))
        sessions = [session_from_json(row["session"]) for row in rows]
        assert {row["agent"] for row in rows} == {name}
        assert len(sessions) == 16
        assert sum(s.failed for s in sessions) == report["agents"][name]["failed"]
        assert sum(s.advised for s in sessions) / 16 == report["agents"][name]["advice_rate"]


@pytest.mark.usefixtures("no_drawing")
def test_bench_elsewhere_gives_the_same_figures(tiny_run: TinyRun, tmp_path: Path) -> None:
    overrides = ["evaluate.agents=[ppo]", "evaluate.baselines=[router]"]
    report = bench(config_of(tiny_run.path, *overrides), tmp_path / "out", [tiny_run.path])
    assert list(report["agents"]) == ["ppo", "router"]
    earlier = json.loads((tiny_run.path / "report.json").read_text())["agents"]
    found = json.loads(json.dumps(report["agents"]))
    for agent in (*found.values(), *earlier.values()):
        agent.pop("seconds")
        agent.pop("clears_envelope", None)  # of which nothing is told without all reference lines
    assert found == {name: earlier[name] for name in ("ppo", "router")}
    assert (tmp_path / "out" / "test-ppo.jsonl").read_bytes() == (tiny_run.path / "test-ppo.jsonl").read_bytes()
    assert load_config(tmp_path / "out" / "config.yaml") == config_of(tiny_run.path, *overrides)


@pytest.mark.usefixtures("no_drawing")
def test_streams_may_share_ids(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of items are unique within a stream only: the same questions under shorter ids give the same figures."""
    whole = ProductQA.streams

    def streams(task: ProductQA, split: str) -> list[Stream]:
        short = {s.id: tuple(replace(i, id=i.id.rpartition("/")[2]) for i in s.items) for s in whole(task, split)}
        return [replace(s, items=short[s.id]) for s in whole(task, split)]

    monkeypatch.setattr(ProductQA, "streams", streams)
    config = config_of(tiny_run.path, "evaluate.agents=[ppo]", "evaluate.baselines=[]")
    report = json.loads(json.dumps(bench(config, tmp_path / "out", [tiny_run.path])))
    earlier = json.loads((tiny_run.path / "report.json").read_text())
    assert report["memory_use"]["ppo"] == earlier["memory_use"]["ppo"]
    assert report["examples"] == earlier["examples"]


@pytest.mark.usefixtures("no_drawing")
def test_imitation_alone(run: Path) -> None:
    """A run without PPO has no agent `ppo`; nobody has to say so again."""
    shutil.rmtree(run / "ppo")
    config = config_of(run, "ppo.num_iterations=0", "evaluate.baselines=[router]")
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("num_iterations: 1", "num_iterations: 0")
    )
    assert list(bench(config, run, [run])["agents"]) == ["sft", "router"]


@pytest.mark.usefixtures("no_drawing")
def test_official_files_are_reported_by_group_price_and_macro_mean(tmp_path: Path) -> None:
    write_minishop(tmp_path / "data", MiniShopSpec(1, 2, 12), seed=3)
    with (tmp_path / "data" / "test" / "shop_0001" / "qa.jsonl").open("r+") as file:
        rows = file.readlines()[:4]  # groups of different lengths, so that the two means differ
        file.seek(0)
        file.truncate()
        file.writelines(rows)
    overrides = [f"task.data={tmp_path / 'data'}", "task.name=productqa", "memory.encoder=hashing"]
    overrides += ["evaluate.prices=[.1, .5]", "evaluate.baselines=[router, always_ask]"]
    report = bench(load_config(None, overrides), tmp_path / "out")
    assert list(report["agents"]) == ["router", "always_ask"]
    assert list(report["prices"]) == ["0.1", "0.5"]
    assert set(report["groups"]) == {"shop_0001", "shop_0002"}
    by_group = [report["groups"][g]["0.5"]["router"]["score"] for g in report["groups"]]
    assert report["prices"]["0.5"]["router"]["score"] == pytest.approx(sum(by_group) / 2)
    assert report["prices"]["0.1"]["always_ask"]["score"] == pytest.approx(0.9)
    assert list(report["groups"]["shop_0001"]) == ["0.1", "0.3", "0.5"]


@pytest.mark.usefixtures("no_drawing")
def test_groups_and_both_means_need_no_other_prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agile.bench.BIN", 3)
    rows = [f"{subject}/{k}" for subject, number in (("eyes", 8), ("skin", 3)) for k in range(number)]
    for split in ("train", "dev"):
        lines = [
            {"question": f"{split} {row}?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 1, "exp": "so",
             "subject_name": row.partition("/")[0], "id": f"{split}/{row}"}
            for row in rows
        ]  # fmt: skip
        if split == "dev":
            lines[0]["cop"] = 2  # what is asked most often in training is wrong once
        (tmp_path / f"{split}.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    words = ["task.name=medmcqa", f"task.data={tmp_path}", "memory.encoder=hashing", "task.stream_by=subject"]
    words += ["evaluate.baselines=[never_ask]", "evaluate.agents=[]", "task.stream_length=5"]
    report = bench(load_config(None, words), tmp_path / "out")
    assert not report["macro"] and "prices" not in report
    groups = {name.rpartition("/")[2]: group["0.3"]["never_ask"] for name, group in report["groups"].items()}
    assert {name: (group["n"], group["accuracy"]) for name, group in groups.items()} == {
        "eyes": (8, 7 / 8),  # its two streams together
        "skin": (3, 1.0),
    }
    assert [(part["from"], part["n"]) for part in groups["eyes"]["along_stream"]] == [(0, 6), (3, 2)]
    means = report["agents"]["never_ask"]["means"]
    assert means["macro"]["accuracy"] == pytest.approx((7 / 8 + 1) / 2)
    assert means["micro"]["accuracy"] == report["agents"]["never_ask"]["accuracy"] == pytest.approx(10 / 11)


def test_the_stream_is_weighed_as_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agile.bench.BIN", 2)
    results = [Outcome(f"{s}{i}", s, i, n, "k", s == "a", False) for s, n in (("a", 4), ("b", 3)) for i in range(n)]
    assert [part["accuracy"] for part in _along_stream(results, 0.3, macro=True)] == [0.5, 0.5]
    assert [part["accuracy"] for part in _along_stream(results, 0.3)] == [0.5, pytest.approx(2 / 3)]


@pytest.mark.usefixtures("no_drawing")
def test_ablations_play_the_same_questions_anew(run: Path, tmp_path: Path) -> None:
    names = ["memory", "advice", "tools", "rl", "random_advice"]
    config = config_of(run, "evaluate.baselines=[]", f"evaluate.ablations=[{','.join(names)}]")
    report = bench(config, tmp_path / "out", [run])
    assert report["ablations"]["agent"] == "ppo" and list(report["ablations"]["rows"]) == names
    whole = report["agents"]["ppo"]
    for name, row in report["ablations"]["rows"].items():
        assert row["n"] == 16
        assert row["difference"] == pytest.approx(row["score"] - whole["score"])
        sessions = tmp_path / "out" / "ablations" / f"test-ppo-{name}.jsonl"
        assert sessions.exists() == (name != "rl")  # nobody plays twice
    assert report["ablations"]["rows"]["rl"]["score"] == report["agents"]["sft"]["score"]
    assert report["ablations"]["rows"]["advice"]["advice_rate"] == 0
    without = [session_from_json(r["session"]) for r in read_lines(tmp_path / "out/ablations/test-ppo-memory.jsonl")]
    assert all(not s.retrieved and not s.written for s in without)
    without = [session_from_json(r["session"]) for r in read_lines(tmp_path / "out/ablations/test-ppo-tools.jsonl")]
    assert not any(s.called("SearchProduct") for s in without)
    assert report["notes"] == []


@pytest.mark.usefixtures("no_drawing")
def test_an_ablation_that_is_not_played_is_named(run: Path, tmp_path: Path) -> None:
    config = config_of(run, "evaluate.baselines=[]", "evaluate.ablations=[rl]", "evaluate.agents=[ppo]")
    report = bench(config, tmp_path / "out", [run])
    assert "ablations" not in report
    (note,) = report["notes"]
    assert note == "Ablation not played: rl. It sets sft beside ppo, and the report is about ppo without sft."


def test_ablations_without_a_trained_agent_are_refused(tmp_path: Path) -> None:
    words = ["evaluate.ablations=[memory,rl]", f"out={tmp_path / 'out'}"]
    message = refused("configs/demo.yaml", *words)
    assert "evaluate.ablations=[memory,rl]" in message and "evaluate.checkpoint=RUN" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_drawing")
def test_runs_of_several_seeds_are_pooled(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("seed: 0", "seed: 1", 1))
    config = config_of(run, "evaluate.baselines=[router]", "evaluate.agents=[ppo]", "evaluate.ablations=[memory]")
    report = bench(config, tmp_path / "out", [run, other])
    assert report["agents"]["ppo"]["n"] == report["agents"]["router"]["n"] == 32
    seeds = report["seeds"]
    assert list(seeds) == ["ppo", "router", "ppo memory"]
    assert [(r["run"], r["seed"]) for r in seeds["ppo"]["runs"]] == [("run", 0), ("other", 1)]
    assert seeds["router"]["spread"]["score"] == 0  # the worlds were copied
    assert seeds["ppo"]["mean"]["score"] == pytest.approx(report["agents"]["ppo"]["score"])
    assert load_config(tmp_path / "out" / "other" / "config.yaml").seed == 1
    with pytest.raises(AgileError, match=r"2 runs of the seeds 0, 0; expected another seed for each"):
        (other / "config.yaml").write_text(text)
        bench(config, tmp_path / "again", [run, other])


# --------------------------------------------------------------------------------------------------------------------
# What it refuses


def refused(*words: str | Path) -> str:
    """The message of a bench that a user can mend."""
    result = agile("bench", *words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_checkpoint_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        before = files(tmp_path)
        message = refused("configs/demo.yaml", f"evaluate.checkpoint={tmp_path / name}", f"out={tmp_path / 'out'}")
        assert f"{tmp_path / name} is no run" in message and "agile train" in message
        assert files(tmp_path) == before


def test_agent_that_was_not_trained_yet(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "ppo")
    message = refused(run / "config.yaml", f"evaluate.checkpoint={run}", f"out={tmp_path / 'out'}")
    assert f"no trained agent 'ppo' in {run}" in message
    assert "--resume" in message and "evaluate.agents" in message
    assert not (tmp_path / "out").exists()


def test_worlds_that_it_may_have_trained_on(tiny_run: TinyRun, tmp_path: Path) -> None:
    words = [f"evaluate.checkpoint={tiny_run.path}", f"out={tmp_path / 'out'}", "task.num_train_worlds=1"]
    message = refused(tiny_run.path / "config.yaml", *words)
    assert "task.num_train_worlds was 3, is now 1" in message
    assert f"agile bench {tiny_run.path / 'config.yaml'}" in message


def test_report_of_a_training_run_is_not_overwritten(tiny_run: TinyRun) -> None:
    before = (tiny_run.path / "report.json").read_bytes()
    assert "its report stays" in refused(tiny_run.path / "config.yaml", f"out={tiny_run.path}")
    assert (tiny_run.path / "report.json").read_bytes() == before


def test_two_benches_in_one_folder_are_refused(tmp_path: Path) -> None:
    words = ["evaluate.baselines=[router]", "memory.encoder=hashing", f"out={tmp_path}"]
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        assert f"Another process works in {tmp_path}" in refused("configs/demo.yaml", *words)
        other.kill()


@pytest.mark.usefixtures("no_drawing")
def test_report_of_another_bench_is_not_overwritten(tmp_path: Path) -> None:
    words = ["evaluate.baselines=[router]", "memory.encoder=hashing", f"out={tmp_path / 'out'}"]
    words += ["task.num_train_worlds=1", "task.num_test_worlds=1"]
    assert agile("bench", "configs/demo.yaml", *words).exit_code == 0
    assert agile("bench", "configs/demo.yaml", *words).exit_code == 0  # the same again
    (tmp_path / "out" / "report.json").write_text("{}")  # which is not drawn here
    message = refused("configs/demo.yaml", *words, "seed=1")
    assert "seed was 0, is now 1" in message


@pytest.mark.usefixtures("no_drawing")
def test_mistyped_data_folder_does_not_spoil_the_run_folder(tmp_path: Path) -> None:
    words = ["configs/productqa-baselines.yaml", f"out={tmp_path / 'out'}", "memory.encoder=hashing"]
    message = refused(*words, f"task.data={tmp_path / 'typo'}")
    assert f"{tmp_path / 'typo' / 'product_qa.db'}: no such file" in message
    write_minishop(tmp_path / "data", MiniShopSpec(1, 1, 4), seed=0)
    result = agile("bench", *words, f"task.data={tmp_path / 'data'}", "evaluate.baselines=[router]")
    assert result.exit_code == 0, result.output


def test_malformed_line_of_the_data(tmp_path: Path) -> None:
    write_minishop(tmp_path / "data", MiniShopSpec(1, 1, 4), seed=0)
    path = tmp_path / "data" / "test" / "shop_0001" / "qa.jsonl"
    path.write_text(path.read_text().replace('"type"', '"tpye"'))
    words = [f"task.data={tmp_path / 'data'}", f"out={tmp_path / 'out'}", "memory.encoder=hashing"]
    message = refused("configs/productqa-baselines.yaml", *words)
    assert f"{path}, line 1, field 'type': expected text" in message


def test_checkpoint_of_another_shape(run: Path) -> None:
    path = run / "ppo" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 64}))
    before = (run / "report.json").read_bytes()
    message = refused(run / "config.yaml", f"evaluate.checkpoint={run}", f"out={run}")
    assert f"The weights in {run / 'ppo'} are of another shape than its config.json says" in message
    assert (run / "report.json").read_bytes() == before


def test_torn_weights(run: Path) -> None:
    path = run / "sft" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert str(run / "sft") in refused(run / "config.yaml", f"evaluate.checkpoint={run}", f"out={run}")


@pytest.mark.parametrize("damage", ["no action tokens", "not JSON", "missing"])
def test_tokenizer_of_a_checkpoint(run: Path, damage: str) -> None:
    path = run / "sft" / "tokenizer.json"
    if damage == "no action tokens":
        tokenizer: PreTrainedTokenizerFast = build_tokenizer("word", ["is it red ?"], AgentSpec("none", ()))
        tokenizer.save_pretrained(path.parent)
        expected = "no token for the actions [GetQuestion]"
    elif damage == "not JSON":
        path.write_text("{")
        expected = f"Cannot load a tokenizer from {path.parent}"
    else:
        path.unlink()
        expected = f"Cannot load a tokenizer from {path.parent}"
    assert expected in refused(run / "config.yaml", f"evaluate.checkpoint={run}", f"out={run}")


def test_full_disk_leaves_the_last_report(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {name: (run / name).read_bytes() for name in ("report.json", "test-ppo.jsonl")}
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(AgileError, match=r"Cannot write to .*test-sft.jsonl: No space left on device"):
        bench(config_of(run, "evaluate.baselines=[]"), run, [run])
    assert before == {name: (run / name).read_bytes() for name in before}
