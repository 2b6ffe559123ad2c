"""The command line: `agile --help` lists the commands."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agile import __version__, cli_grade, cli_rft, cli_serve, ranks
from agile.cli_words import Config, Overrides, parse
from agile.errors import AgileError
from agile.screen import BEGINS_AGAIN, GOES_ON, RESUMES, console, one_screen

if TYPE_CHECKING:
    from agile.config import RunConfig

# Nothing heavy is imported up here: `agile --help` and a mistyped config are answered at once.

app = typer.Typer(
    name="agile",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)

Run = Annotated[str, typer.Argument(help="Run folder of `agile demo`, `train` or `bench`; out=RUN works too.")]
SessionId = Annotated[
    str | None, typer.Option("--session", metavar="ID", help="Only the session of this id, such as shop_0001/3.")
]
Step = Annotated[
    int | None, typer.Option("--step", metavar="N", help="Only what this iteration of training played, from 1.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run folder.")]
SkipBadRows = Annotated[
    bool,
    typer.Option("--skip-bad-rows", help="Leave bad rows of the task's files out and list them (task.skip_bad_rows)."),
]


def _load(
    config: Path | None,
    overrides: Sequence[str] | None,
    default_out: str,
    *,
    seed: int | None = None,
    skip_bad_rows: bool = False,
) -> tuple[RunConfig, Path]:
    """The config with what the command line changes of it, and the folder to write to."""
    from agile.config import load_config

    out, rest = parse(overrides or [], default_out)
    seeds = [] if seed is None else [f"seed={seed}"]
    return load_config(config, [*seeds, *rest, *["task.skip_bad_rows=true"] * skip_bad_rows]), out


def _logged(run: str) -> Path:
    """The folder of a run that has logged sessions.

    Raises:
        AgileError: It has none.
    """
    from agile.session_log import session_logs

    folder = Path(run.removeprefix("out=")).expanduser()
    session_logs(folder)
    return folder


def _version(show: bool) -> None:
    if show:
        console.print(f"agile {__version__}")
        raise typer.Exit


@app.callback()
def agile(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,  # deepspeed's launcher adds it
) -> None:
    """Train language-model agents that look up, remember, and ask people only when it is worth the price.

    Start with `agile demo`. Each command takes `out=DIR`, the folder it writes to (by default under `runs/`), and
    changes of its config as `a.b=value`. `agile COMMAND --help` says more.
    """
    # Libraries would print progress bars and advice of their own, and ask the network for models that are here.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if ranks.world_size() > 1 and context.invoked_subcommand != "train":
        with one_screen():
            ranks.join()
            raise AgileError(
                f"agile {context.invoked_subcommand} runs in one process, but a launcher started {ranks.world_size()}. "
                "Start it without torchrun or deepspeed; only agile train runs in many (docs/training.md)."
            )
    if not ranks.is_main():
        logging.disable(logging.WARNING)  # the main process says it


@app.command()
def demo(
    overrides: Overrides = None,
    seed: Annotated[
        int | None, typer.Option(help="Another seed is other worlds and another run (default: 0).", show_default=False)
    ] = None,
    resume: Resume = False,
) -> None:
    """Watch an agent learn end to end, on a CPU, in minutes.

    Writes small shop worlds, teaches a tiny model by imitation, improves it by PPO on what answers are worth and what
    advice costs, and compares it with agents that do not learn, on worlds that it has never seen.

    `runs/demo` then holds `report.html` and `report.json`, every session token by token, `metrics.jsonl`, TensorBoard
    files, checkpoints, and the agents as Hugging Face folders `sft` and `ppo`. Go on with `agile chat`.

    - `agile demo`
    - `agile demo --seed 1 out=runs/demo-1`
    - `agile demo --resume`
    """
    with one_screen(RESUMES):
        config, out = _load(Path(__file__).parent / "configs" / "demo.yaml", overrides, "runs/demo", seed=seed)

        from agile.demo import run_demo

        run_demo(config, out, console, resume=resume)


@app.command()
def train(
    config: Config, overrides: Overrides = None, resume: Resume = False, skip_bad_rows: SkipBadRows = False
) -> None:
    """Train an agent by imitation, then by PPO, then on preferences if it is told to.

    The run folder (`runs/<name of the config>`) then holds `config.yaml`, every session token by token,
    `metrics.jsonl`, TensorBoard files, checkpoints, and the agents as Hugging Face folders `sft` and `ppo`. Killing it
    loses nothing: the same command with `--resume` gives the same run. On several GPUs or machines a launcher starts
    the same command, see docs/training.md.

    `stages=[sft,ppo,dpo,reward-model]` says what is trained (by default the first two). The last two run TRL's own
    trainers (the extra `trl`) on what experts corrected, or on the file `preferences.data`, and write the agent `dpo`
    and the sequence classifier `reward-model`. Killed in one of them, a run starts that stage anew.

    `task.desk` trains the agent that `agile serve` serves on what people asked it and what they said of its answers
    (docs/serve.md).

    - `agile train configs/productqa-tiny.yaml task.data=DIR`
    - `agile train configs/from-desk.yaml task.desk.since=2026-11-01`
    - `agile train configs/demo.yaml ppo.lr=1e-4 evaluate.baselines=[router] out=runs/mine`
    - `torchrun --nproc-per-node 8 -m agile.cli train CONFIG engine.zero_stage=2`
    """
    with one_screen(RESUMES):
        ranks.join()
        loaded, out = _load(config, overrides, f"runs/{config.stem}", skip_bad_rows=skip_bad_rows)
        if loaded.task.desk is not None:
            from agile.extras import needs

            with needs("serve"):
                from agile.serve.export import from_desk_config

            loaded = from_desk_config(loaded)

        from agile.training import train as run

        run(loaded, out, resume=resume)
        if ranks.is_main():
            console.print(
                f"Trained: {out}. Score it: agile bench {out / 'config.yaml'} evaluate.checkpoint={out} out={out}",
                soft_wrap=True,
            )


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs of the run, one process each.")] = 1,
    gpu_memory: Annotated[float, typer.Option("--gpu-memory", min=1, help="Memory of one GPU in GiB.")] = 80.0,
    action_share: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=1,
            help="Share of the tokens that the LLM samples, where logits are computed; one in seven in the demo.",
        ),
    ] = 0.25,
) -> None:
    """Tell what a run takes of each GPU's memory, before any hour of it is paid for.

    Weights, gradients and optimizer by DeepSpeed's estimators; activations by running the model's own code on tensors
    without values; the critic, the reference policy, and what plays the sessions. Needs no GPU and no weights: of
    `model.path` the `config.json` is enough, and the models of `configs/` are known.

    If it does not fit, it says which changes of the config would make it fit, the cheapest first, and ends with code 1.

    - `agile plan configs/productqa-qwen2.5-7b.yaml --gpus 4 --gpu-memory 80 task.data=DIR`
    - `agile plan configs/productqa-vicuna-13b.yaml --gpus 8 --gpu-memory 40 engine.offload=optimizer task.data=DIR`
    """
    with one_screen():
        from agile.plan import run_plan

        _, rest = parse(overrides or [], "runs/plan")
        if not run_plan(config, rest, gpus, gpu_memory, action_share, console):
            raise typer.Exit(1)


@app.command()
def bench(
    config: Config,
    overrides: Overrides = None,
    skip_bad_rows: SkipBadRows = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it would take (sessions, calls, tokens, money) and stop.")
    ] = False,
) -> None:
    """Score agents and baselines on the test questions of a task.

    With `evaluate.checkpoint=RUN` the agents that this run trained, and the baselines; without, the baselines alone.
    `evaluate.agents` and `evaluate.baselines` name them. The agent `prompted` needs no run: it is a model behind an
    OpenAI-compatible endpoint (`evaluate.prompted`). What it answered is kept: stopped and started again, nothing is
    paid for twice.

    `evaluate.ablations=[memory,reflection,advice,tools,rl]` also plays the trained agent without each of these, and
    several runs in `evaluate.checkpoint=[RUN1,RUN2]` are pooled; docs/benchmark.md says how to read it all.

    Prints the table, and writes `report.json`, `report.html`, `report.png` and the agents' sessions to
    `runs/<name of the config>-bench`.

    - `agile bench configs/productqa-baselines.yaml task.data=DIR`
    - `agile bench runs/mine/config.yaml evaluate.checkpoint=runs/mine out=runs/mine`
    - `agile bench configs/productqa-prompted.yaml task.data=DIR evaluate.prompted.model=NAME`
    - `agile bench configs/paper/main.yaml task.data=DIR --dry-run`
    """
    with one_screen(BEGINS_AGAIN):
        loaded, out = _load(config, overrides, f"runs/{config.stem}-bench", skip_bad_rows=skip_bad_rows)
        if dry_run:
            from agile.dry_run import print_plan

            print_plan(loaded, console)
            return

        from agile.bench import bench as run
        from agile.report import render_table

        if set(loaded.evaluate.agents) - {"prompted"} and not loaded.evaluate.checkpoint:
            console.print("No trained agents; evaluate.checkpoint=RUN adds the agents of a run.")
        render_table(run(loaded, out, loaded.evaluate.checkpoint), console)
        console.print(f"Report: {out / 'report.html'}", soft_wrap=True)


@app.command()
def chat(
    run: Annotated[str, typer.Argument(help="Run folder with a trained agent; out=RUN works too.")] = "runs/demo",
    memory: Annotated[
        Path | None,
        typer.Option(help="File in which it remembers (default: chat.sqlite in the run folder).", show_default=False),
    ] = None,
) -> None:
    """Ask the trained agent about a shop, and be its expert.

    Where it asks for advice, it asks you, in this terminal. It remembers what you taught it, also the next time.

    - `agile chat`
    - `agile chat runs/demo-1 --memory mine.sqlite`
    """
    with one_screen():
        folder = Path(run.removeprefix("out=")).expanduser()

        from agile.chat import run_chat

        run_chat(folder, memory or folder / "chat.sqlite", console)


@app.command()
def show(
    run: Run = "runs/demo",
    session: SessionId = None,
    step: Step = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Each sampled token with its log-probability.")] = False,
    values: Annotated[
        bool, typer.Option("--values", help="Also the value and advantage that the newest critic gives it.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write it as a page.", show_default=False)
    ] = None,
) -> None:
    """Read sessions: who wrote what, what memory held, what advice cost, what it was worth.

    Without `--session` it lists the sessions of a step, the newest by default.

    - `agile show runs/demo`
    - `agile show runs/demo --session shop_0001/3 --logprobs`
    - `agile show runs/demo --session shop_0001/3 --step 2 --values --html session.html`
    """
    with one_screen():
        folder = _logged(run)

        from agile.show_run import show as show_sessions

        show_sessions(folder, console, session, step, logprobs=logprobs, values=values, html=html)


@app.command()
def replay(
    run: Run = "runs/demo",
    session: SessionId = None,
    step: Step = None,
    rescore: Annotated[
        Path | None,
        typer.Option("--rescore", metavar="MODEL", help="Compare logprobs with this Hugging Face folder instead."),
    ] = None,
) -> None:
    """Play logged sessions again with today's code: do prompts, parsing and rewards still give the same tokens?

    What the model, memory, tools and experts gave comes from the logs. The first token or reward that differs is
    named, with exit code 1.

    With `--rescore` nothing is played: a model scores the logged tokens (`RUN/sft` should agree with version 0).

    - `agile replay runs/demo`
    - `agile replay runs/demo --session shop_0001/3 --step 2`
    - `agile replay runs/demo --rescore runs/demo/sft`
    """
    with one_screen():
        folder = _logged(run)

        if rescore is not None:
            from agile.rescore import print_drifts, rescore_run

            print_drifts(rescore_run(folder, rescore, console, session_id=session, step=step), console)
            return

        from agile.replay import replay_run

        result = replay_run(folder, console, session_id=session, step=step)
        console.print(str(result), markup=False, soft_wrap=True)
        if result.different is not None:
            raise typer.Exit(1)


@app.command()
def preferences(
    run: Run = "runs/demo",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Default: preferences.jsonl in the run folder.", show_default=False),
    ] = None,
    gold: Annotated[
        bool, typer.Option("--gold", help="Where no expert was asked, take the task's own answer as the right one.")
    ] = False,
) -> None:
    """Write pairs of a right and a wrong answer for DPO and reward models, in TRL's format.

    A pair comes from a question that the agent answered wrong by itself and that an expert answered in another session
    of training. `prompt` is what the agent saw, `chosen` the expert's answer, `rejected` the agent's. What is left
    out, and why, is counted.

    - `agile preferences runs/demo`
    - `agile preferences runs/demo --gold --out pairs.jsonl`
    - `agile train CONFIG stages=[dpo,reward-model] model.path=runs/demo/ppo preferences.data=pairs.jsonl`
    """
    with one_screen():
        folder = _logged(run)

        from agile.preferences import export_preferences

        export_preferences(folder, out or folder / "preferences.jsonl", console, gold=gold)


@app.command("sft-data")
def sft_data(
    config: Config,
    overrides: Overrides = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes (default: one per processor).", show_default=False),
    ] = None,
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """Build imitation sessions beforehand, of the task's teacher or of a stronger model, on all train questions.

    The teacher knows the gold answers (SQL, supporting facts, reflections) and has a judge of what can be answered
    without an expert: the model `sft.judge`, or a draw. `sft.teacher` names a model behind an OpenAI-compatible
    endpoint instead, told the rules; what it did is kept where it was right (HotPotQA: with fewer than 5 searches), in
    the agent's own tokens.

    Writes `sft-data.jsonl` to `runs/<name of the config>-sft-data`, and what was kept and why not to `sft-data.json`.
    Killed and started again it goes on, to the same file. `agile train CONFIG sft.data=DIR` learns from it.

    - `agile sft-data configs/productqa-qwen2.5-7b.yaml task.data=DIR --workers 16`
    - `agile sft-data configs/hotpotqa-tiny.yaml task.data=FILE sft.teacher.model=NAME`
    """
    with one_screen(GOES_ON):
        loaded, out = _load(config, overrides, f"runs/{config.stem}-sft-data", skip_bad_rows=skip_bad_rows)

        from agile.sft_data import build_sft_data, render_summary

        render_summary(build_sft_data(loaded, out, console, workers=workers), console)
        console.print(f"Train on it: agile train {config} sft.data={out}", soft_wrap=True)


@app.command("vllm-server")
def vllm_server(
    model: Annotated[Path, typer.Argument(help="Model folder, such as RUN/sft.", show_default=False)],
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    host: Annotated[str, typer.Option(help="Address; it obeys whoever reaches it.")] = "127.0.0.1",
    python: Annotated[
        str, typer.Option(help="Python of the environment that has vLLM (default: this one).", show_default=False)
    ] = sys.executable,
    name: Annotated[str, typer.Option(help="Name of the model, as vllm.name.")] = "agile",
    dtype: Annotated[str | None, typer.Option(help="By default the saved model's.", show_default=False)] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest context.", show_default=False)] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Most sequences sampled at once.")] = 256,
    kv_cache_gib: Annotated[float | None, typer.Option(help="KV cache; needed on a CPU.", show_default=False)] = None,
    block_size: Annotated[
        int | None,
        typer.Option(help="Tokens per block of the prefix cache; vLLM's choice by default.", show_default=False),
    ] = None,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="Start in seconds, compile nothing.")] = False,
) -> None:
    """Start a vLLM server for `rollout.policy=vllm-server`, which takes over the trainer's weights.

    - `agile vllm-server runs/mine/sft --port 8000`
    - `agile vllm-server runs/mine/sft --kv-cache-gib 1 --enforce-eager`
    - `agile train CONFIG rollout.policy=vllm-server vllm.servers=[http://127.0.0.1:8000] vllm.weights_dir=runs/weights`
    """
    with one_screen():
        from agile.policies.vllm_http import saved_dtype, server_command

        command = server_command(
            model,
            port,
            host=host,
            python=python,
            name=name,
            dtype=dtype or saved_dtype(model),
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            kv_cache_gib=kv_cache_gib,
            enforce_eager=enforce_eager,
            block_size=block_size,
        )
        console.print(" ".join(command), markup=False, soft_wrap=True)
        os.execvp(command[0], command)


@app.command()
def minishop(
    folder: Annotated[str, typer.Argument(help="New or empty folder; out=DIR works too.")] = "runs/minishop",
    overrides: Overrides = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed writes the same files (default: 0).", show_default=False)
    ] = None,
) -> None:
    """Write MiniShop worlds: small generated shops in ProductQA's file format.

    `task.num_train_worlds`, `task.num_test_worlds` and `task.num_questions` say how many.

    - `agile minishop worlds`
    - `agile minishop worlds task.num_train_worlds=10 task.num_questions=60 --seed 1`
    """
    with one_screen():
        from agile.tasks.minishop import MiniShopSpec, write_minishop

        words = [folder if "=" in folder else f"out={folder}", *(overrides or [])]
        config, out = _load(None, words, "runs/minishop", seed=seed)
        task = config.task
        spec = MiniShopSpec(task.num_train_worlds, task.num_test_worlds, task.num_questions)
        write_minishop(out, spec, config.seed)
        console.print(f"{task.num_train_worlds} train and {task.num_test_worlds} test worlds: {out}", soft_wrap=True)


app.add_typer(cli_grade.app, name="grade")
cli_rft.add_to(app)
cli_serve.add_to(app)


def main() -> None:
    app(prog_name="agile")


if __name__ == "__main__":
    main()
