"""`agile serve`: one process with an agent, its API and its desk; and its accounts, `agile serve-user`."""

from __future__ import annotations

import gc
import ipaddress
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import uvicorn
import yaml
from fastapi import FastAPI
from pydantic import ValidationError
from rich.console import Console

from agile.build import Setup
from agile.config import RunConfig, load_config
from agile.errors import AgileError
from agile.loaded import agent_of, ready
from agile.memory.encoders import Encoder
from agile.protocols import Advisor
from agile.run_folder import writing
from agile.serve import deployments
from agile.serve.access import Access, secret_of
from agile.serve.app import accuracy, create_app, queue_length
from agile.serve.database import Database, database_url
from agile.serve.deployments import BY_CONFIG
from agile.serve.logs import log_as_json
from agile.serve.memory import DeskMemory
from agile.serve.metrics import Metrics
from agile.serve.models import Deployment
from agile.serve.requests import Similar
from agile.serve.runner import Runner, Served
from agile.subjects import subjects


def served_config(path: Path, overrides: Sequence[str], swapped: Path | None = None) -> RunConfig:
    """The config of the run that is served, with what the server's own config says otherwise.

    Args:
        swapped: A run whose agent takes the place of that of `serve.run`: products, tools, memory and price stay.

    Raises:
        AgileError: A config cannot be used, or a run has no agent.
    """
    given = load_config(path, overrides)
    run = given.serve.run
    if run is None:
        raise AgileError(f"The config {path} names no run to serve; set serve.run=RUN, for example runs/demo.")
    agent_of(run)
    values = load_config(run / "config.yaml").model_dump(mode="json")
    if swapped is not None:
        agent_of(swapped)
        own = load_config(swapped / "config.yaml").model_dump(mode="json")
        values |= {name: own[name] for name in ("agent", "model", "lora", "prompt", "rollout", "vllm", "engine")}
    values["task"]["desk"] = None  # what it learned from
    try:
        return RunConfig.model_validate(_over(values, given.model_dump(mode="json", exclude_unset=True)))
    except ValidationError as error:
        raise AgileError(f"{path} does not go with {run / 'config.yaml'}: {error.errors()[0]['msg']}") from None


def _over(below: dict[str, object], above: dict[str, object]) -> dict[str, object]:
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = _over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def load_served(config: RunConfig, run: Path, deployed: Deployment | None = None) -> tuple[Setup, Served]:
    """The agent of a run, ready to answer about its subjects (see `agile.subjects`).

    Args:
        run: Whose shop it is, and whose agent but for `deployed`.

    Raises:
        AgileError: There is no such agent, or its questions come with more than a client could say.
    """
    folder = run / agent_of(run, config.serve.agent)
    if deployed is not None:
        folder = Path(deployed.run) / agent_of(Path(deployed.run), deployed.agent)
    if deployed is not None and deployed.by != BY_CONFIG and config.rollout.policy == "vllm-server":
        raise AgileError(
            f"{folder} is played by vLLM servers, which hold one set of weights: sessions under way would go on with "
            "others. Stop the server and start it with serve.run."
        )
    setup = Setup(config, run)
    products = subjects(setup.task, config.task.name)
    executor, policy = ready(setup, folder)
    number = None if deployed is None else deployed.id
    return setup, Served(config.serve.model, folder.name, executor, policy, products, config.seed, number)


def similar_by(encoder: Encoder, threshold: float) -> Similar | None:
    """Which waiting question is as similar as that, by cosine."""
    if threshold >= 1:
        return None

    def similar(question: str, others: Sequence[str]) -> int | None:
        vectors = np.asarray(encoder.encode([question, *others]))
        cosines = vectors[1:] @ vectors[0]
        best = int(cosines.argmax())
        return best if cosines[best] >= threshold else None

    return similar


def make_app(
    config: RunConfig,
    out: Path,
    database: Database,
    served: Served,
    encoder: Encoder,
    *,
    fallback: Advisor | None = None,
    secure: bool = False,
    load: Callable[[int], Served] | None = None,
) -> FastAPI:
    """The application of a server whose folder is `out`.

    Args:
        load: Gives the agent of a deployment; without it nothing can be swapped.
    """
    serve = config.serve
    memory = DeskMemory(database, encoder)
    shares = {name: partial(accuracy, database, sampled=name == "sampled") for name in ("all", "sampled")}
    metrics = Metrics(lambda: queue_length(database), shares)
    runner = Runner(
        database,
        served,
        memory,
        metrics,
        out,
        advice_timeout_s=serve.advice_timeout_s,
        fallback=fallback,
        hours=serve.hours,
        agree=serve.agree,
        similar=similar_by(encoder, serve.join_similarity),
        load=load,
    )
    access = Access(
        database,
        secret_of(out),
        hours=serve.login_hours,
        secure=secure,
        requests_per_minute=serve.requests_per_minute,
    )
    return create_app(serve, database, runner, memory, metrics, access)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0"), is_loopback("desk.example")
    (True, True, False, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def run_server(
    path: Path,
    overrides: Sequence[str],
    out: Path,
    console: Console,
    *,
    host: str,
    port: int,
    tls: tuple[Path, Path] | None = None,
    behind_proxy: bool = False,
) -> None:
    """Serve until interrupted.

    Raises:
        AgileError: The config cannot be used, or the address can be reached from elsewhere without encryption.
    """
    if not is_loopback(host) and tls is None and not behind_proxy:
        raise AgileError(
            f"{host} can be reached from other machines, where passwords and keys would be read on the way. Give "
            "--tls-cert FILE --tls-key FILE, or --behind-proxy if a proxy in front encrypts."
        )
    if missing := [str(file) for file in tls or () if not file.exists()]:
        raise AgileError(f"There is no {' and no '.join(missing)}; give the files of a certificate and its key.")
    config = served_config(path, overrides)
    run = config.serve.run
    assert run is not None  # served_config checks it
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        # as a bench notes it: `agile show` finds the agent's tokenizer there
        noted = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"checkpoint": (run,)})})
        (out / "config.yaml").write_text(yaml.safe_dump(noted.model_dump(mode="json"), sort_keys=False), "utf-8")
    url = database_url(config.serve.database, out)
    with closing(Database(url)) as database:

        def load(number: int) -> tuple[Setup, Served]:
            deployed = deployments.by_id(database, number)
            if deployed is None:
                raise AgileError(f"The database knows no deployment {number}; is it another server's?")
            return load_served(served_config(path, overrides, Path(deployed.run)), run, deployed)

        first = deployments.starting(database, run, agent_of(run, config.serve.agent))
        setup, served = load(first.id)
        deployments.settle(database, first.id)
        fallback = None if config.serve.fallback is None else setup.advisor(config.serve.fallback)
        secure = tls is not None or behind_proxy
        app = make_app(
            config,
            out,
            database,
            served,
            setup.encoder,
            fallback=fallback,
            secure=secure,
            load=lambda number: load(number)[1],
        )
        address = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
        agent = Path(first.run) / first.agent
        console.print(f"The agent {agent} answers at {address}/v1, its desk is {address}/desk/queue", soft_wrap=True)
        console.print(f"Accounts: agile serve-user add NAME --role expert {path} out={out}", soft_wrap=True)
        listen(app, host=host, port=port, proxy_headers=behind_proxy, tls=tls)


def listen(
    app: FastAPI, *, host: str, port: int, proxy_headers: bool = False, tls: tuple[Path, Path] | None = None
) -> None:
    """Answer requests until interrupted, and log them."""
    log_as_json()
    gc.collect()
    gc.freeze()  # models and modules stay: to walk through them again and again would hold everybody up
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=proxy_headers,
        timeout_graceful_shutdown=3,
        ssl_certfile=str(tls[0]) if tls else None,
        ssl_keyfile=str(tls[1]) if tls else None,
    )
