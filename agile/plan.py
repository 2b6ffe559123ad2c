"""`agile plan`: what a run takes of each GPU's memory, before any hour of it is paid for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from agile.activations import activation_bytes, shaped
from agile.config import RunConfig, load_config
from agile.errors import AgileError
from agile.model import check_context
from agile.training import check_processes

GIB = 2**30
SHIPPED = Path(__file__).parent / "configs" / "models"
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CUDA_BYTES = 1.5 * GIB  # the driver's context, NCCL's channels, cuBLAS's workspace
MARGIN = 0.05  # what the caching allocator loses between tensors
When = Literal["always", "loading", "scoring", "learning", "stepping"]


@dataclass(frozen=True, slots=True)
class Item:
    """Something that takes memory of each GPU, or of the CPU.

    Attributes:
        when: `loading`, `scoring`, `learning` (forward and backward), `stepping` follow each other and do not add up.
    """

    name: str
    num_bytes: float
    note: str
    when: When = "always"


@dataclass(frozen=True, slots=True)
class Plan:
    """What one GPU has to hold.

    Attributes:
        host: Memory of the CPU, for all GPUs together.
    """

    items: tuple[Item, ...]
    host: tuple[Item, ...]
    gpu_bytes: float

    @property
    def total(self) -> float:
        return at_most(self.items)

    @property
    def largest(self) -> Item:
        return max(self.items, key=lambda item: item.num_bytes)

    @property
    def fits(self) -> bool:
        return self.total <= (1 - MARGIN) * self.gpu_bytes


def at_most(items: Sequence[Item]) -> float:
    """The bytes that are taken at a time."""
    taken = {when: sum(i.num_bytes for i in items if i.when == when) for when in get_args(When)}
    return taken.pop("always") + max(taken.values())


# --------------------------------------------------------------------------------------------------------------------
# The model, without weights


def architecture(config: RunConfig) -> PretrainedConfig:
    """What `model.path` says of the model's shape: a folder, a model that was downloaded before, or one known here.

    Raises:
        AgileError: Nothing says it, or the model reads shorter contexts than the run's.
    """
    model = config.model
    if model.path is None:
        return LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=2 * model.hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            max_position_embeddings=config.rollout.max_context_tokens,
            tie_word_embeddings=False,
        )
    known = SHIPPED / f"{Path(model.path).name}.json"
    try:
        if known.exists() and not Path(model.path).exists():
            shape: PretrainedConfig = AutoConfig.for_model(**json.loads(known.read_text()))
        else:
            shape = AutoConfig.from_pretrained(model.path, local_files_only=True)
    except Exception as error:  # configs of models have checks of their own
        shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.json")))
        raise AgileError(
            f"The shape of model.path={model.path} is not known: {str(error).partition(chr(10))[0]} Give a folder with "
            f"config.json (no weights are needed), or one of {shipped}."
        ) from None
    check_context(shape, config.rollout.max_context_tokens)
    return shape


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters: of the language model, of all that is there in training, of what is trained, of the largest layer."""

    lm: int
    total: int
    trained: int
    largest: int


def count(config: RunConfig, shape: PretrainedConfig) -> Counts:
    """Counted on the model's own class, tied weights once."""
    lm = shaped(shape)
    num_lm = sum(p.numel() for p in lm.parameters())
    size = shape.get_text_config().hidden_size
    critic = size * size + 2 * size + 1
    if config.model.critic == "separate":
        critic += sum(p.numel() for p in lm.base_model.parameters())
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in lm.modules())
    if config.lora is None:
        return Counts(num_lm, num_lm + critic, num_lm + critic, largest)
    from agile.lora import add_adapter

    add_adapter(lm, rank=config.lora.rank, alpha=config.lora.alpha, target_modules=config.lora.target_modules)
    adapter = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    return Counts(num_lm, num_lm + adapter + critic, adapter + critic, largest)


# --------------------------------------------------------------------------------------------------------------------
# Memory


def state_bytes(counts: Counts, *, zero_stage: int, offload: str, dtype: str, num_gpus: int) -> tuple[float, float]:
    """Weights, gradients, and AdamW's state with its weights in float32: bytes of each GPU, of the CPU for all GPUs.

    For ZeRO 2 and 3 by DeepSpeed's own estimators, which are for weights of two bytes; what float32 takes on top,
    frozen weights, and stages 0 and 1 by the arithmetic that they rest on.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    trained, frozen, size = counts.trained, counts.total - counts.trained, BYTES[dtype]
    if zero_stage == 0:
        return 4 * (frozen + 4 * trained), 0.0
    if zero_stage == 3:
        cpu, gpu, _ = estimate_zero3_model_states_mem_needs(
            trained, counts.largest, num_gpus, 1, cpu_offload=offload != "none", cpu_offload_params=offload == "all"
        )
        wide = {"none": 2 * trained, "optimizer": trained, "all": 0}[offload] * (size - 2) / num_gpus
        kept = 0 if offload == "all" else size * frozen / num_gpus
        return gpu + wide + kept, float(cpu if offload != "none" else 0)
    cpu, gpu = estimate_zero2_model_states_mem_needs(trained, num_gpus, 1, cpu_offload=offload != "none")
    whole = size * trained * (1 - 1 / num_gpus) if zero_stage == 1 or offload != "none" else 0  # gradients not sharded
    wide = (size - 2) * trained * (1 + (1 / num_gpus if offload == "none" else 0))
    return gpu + wide + whole + size * frozen, float(cpu if offload != "none" else 0)


def step_bytes(num_trained: int, *, zero_stage: int, num_gpus: int) -> float:
    """What AdamW's step takes beside its state: the gradient in float32 of what ZeRO keeps as one tensor, a share.

    Under ZeRO 3 that is of at most so many elements (DeepSpeed's sub_group_size).
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if zero_stage == 0:
        return 0.0
    share = num_trained / num_gpus
    return 4 * (min(share, DeepSpeedZeroConfig().sub_group_size) if zero_stage == 3 else share)


def memory(config: RunConfig, num_gpus: int, gpu_gib: float, action_share: float) -> Plan:
    """What a run of this config takes of each of so many GPUs.

    Args:
        gpu_gib: Memory of one GPU.
        action_share: Share of the tokens that the LLM samples: logits are computed for these alone.

    Raises:
        AgileError: There would not be work for so many GPUs, the model's shape is not known, or TRL trains.
    """
    if by_trl := [stage for stage in config.stages if stage in ("dpo", "reward-model")]:
        ours = [stage for stage in config.stages if stage not in by_trl] or ["sft", "ppo"]
        raise AgileError(
            f"agile plan counts what AGILE's own stages take, but stages has {', '.join(by_trl)}, which TRL trains on "
            f"one GPU. Plan stages=[{','.join(ours)}]; a DPO of all weights takes 20 bytes a parameter and activations."
        )
    check_processes(config, num_gpus)
    engine, ppo = config.engine, config.ppo
    shape = architecture(config)
    counts = count(config, shape)
    size = BYTES[engine.dtype]
    states, offloaded = state_bytes(
        counts, zero_stage=engine.zero_stage, offload=engine.offload, dtype=engine.dtype, num_gpus=num_gpus
    )
    items = [
        Item(
            "model states",
            states,
            f"{counts.trained / 1e9:.3g} B of {counts.total / 1e9:.3g} B parameters trained, {engine.dtype}, "
            f"ZeRO {engine.zero_stage}, offload {engine.offload}",
        ),
        Item("CUDA, NCCL", CUDA_BYTES, "assumed"),
    ]
    if engine.offload == "none":
        working = step_bytes(counts.trained, zero_stage=engine.zero_stage, num_gpus=num_gpus)
        items.append(Item("AdamW's step", working, "works on all its weights at once", "stepping"))
    items += buckets(counts, zero_stage=engine.zero_stage, size=size)
    stages = [*([config.sft] if config.sft.num_steps else []), *([ppo] if config.plays else [])]
    tokens = max((stage.micro_batch_tokens for stage in stages), default=0)
    tokens = max(tokens, config.rollout.max_context_tokens)  # a longer sequence is alone
    passes: dict[str, Any] = {"num_tokens": tokens, "num_actions": max(1, round(action_share * tokens))}
    passes |= {"dtype": getattr(torch, engine.dtype), "separate_critic": config.model.critic == "separate"}
    note = f"{tokens} tokens, logits for {passes['num_actions']} of them, " + (
        "checkpointed" if engine.gradient_checkpointing else "all kept"
    )
    kept = activation_bytes(shape, **passes, checkpointing=engine.gradient_checkpointing, learning=True)
    items.append(Item("activations", kept, note, "learning"))
    if config.plays:
        items.append(
            Item("scoring", activation_bytes(shape, **passes, checkpointing=False, learning=False), note, "scoring")
        )
        if ppo.kl_coef and config.lora is None:
            items += reference(counts.lm, size, num_gpus, zero_stage=engine.zero_stage, offload=ppo.reference)
        items += rollout(config, shape, counts.lm, gpu_gib)
    return Plan(tuple(items), tuple(host(config, counts, offloaded, num_gpus)), gpu_gib * GIB)


def host(config: RunConfig, counts: Counts, offloaded: float, num_gpus: int) -> Iterator[Item]:
    """What lies in the memory of the CPU: what is offloaded there, and whole models on their way to the GPUs."""
    ppo, zero_3 = config.ppo, config.engine.zero_stage == 3
    size = num_gpus * BYTES[config.engine.dtype]
    copy, kept = float(size * counts.lm), offloaded
    loads = [float(size * counts.total)]
    if offloaded:
        yield Item("offloaded states", offloaded, f"engine.offload={config.engine.offload}")
    if config.plays and ppo.kl_coef and config.lora is None:
        loads.append(kept + copy)
        if ppo.reference == "offload":
            reference = copy / num_gpus if zero_3 else copy
            kept += reference
            yield Item("reference policy", reference, "offloaded" if zero_3 else "offloaded, a whole one per process")
    if config.plays and config.rollout.policy == "hf" and (config.rollout.lag or zero_3):
        loads.append(kept + copy)
    yield Item("loading", max(loads) - kept, "each process loads whole models, one after the other", "loading")


def buckets(counts: Counts, *, zero_stage: int, size: int) -> Iterator[Item]:
    """What DeepSpeed copies gradients through and, under ZeRO 3, the layers that are gathered at a time."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if zero_stage:
        zero = DeepSpeedZeroConfig(stage=zero_stage)
        when: When = "always" if zero_stage == 3 else "learning"
        yield Item("gradient buckets", zero.reduce_bucket_size * size, "DeepSpeed's reduce_bucket_size", when)
        if zero_stage == 3:
            live = min(counts.total, zero.max_live_parameters + zero.prefetch_bucket_size)
            yield Item("gathered layers", live * size, "DeepSpeed's max_live_parameters and prefetch_bucket_size")


def reference(num_params: int, size: int, num_gpus: int, *, zero_stage: int, offload: str) -> Iterator[Item]:
    """The frozen copy that KL is taken to."""
    if zero_stage == 3:
        if offload != "offload":
            yield Item("reference policy", size * num_params / num_gpus, "sharded as the trained one is")
        return
    if offload == "offload":
        yield Item("reference policy", size * num_params, "offloaded, here while it scores", "scoring")
    else:
        yield Item("reference policy", size * num_params, "ppo.reference=keep; a whole copy on each GPU")


def rollout(config: RunConfig, shape: PretrainedConfig, num_params: int, gpu_gib: float) -> Iterator[Item]:
    """What plays the sessions, whose memory stays taken while the trainer learns.

    Raises:
        AgileError: vLLM's share of the memory cannot hold the weights and one context.
    """
    text, play, vllm = shape.get_text_config(), config.rollout, config.vllm
    dtype = config.engine.dtype if vllm.dtype == "auto" or play.policy == "hf" else vllm.dtype
    size = BYTES[dtype]
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * heads * width * size  # keys and values
    context = token * play.max_context_tokens
    if play.policy == "hf":
        if play.lag or config.engine.zero_stage == 3:
            yield Item("rollout's copy of the weights", size * num_params, "rollout.lag above 0, or ZeRO 3")
        slots = play.max_batch_size
        yield Item("keys and values", slots * context, f"{slots} sessions of {play.max_context_tokens} tokens at most")
    elif vllm.kv_cache_gib is not None:
        yield from vllm_items(size * num_params, vllm.kv_cache_gib * GIB, context, "vllm.kv_cache_gib")
    elif play.policy == "vllm-server":
        yield Item("vLLM servers", 0, "on other GPUs; were they on these, vllm.kv_cache_gib would be set")
    else:
        weights = size * num_params
        taken = vllm.gpu_memory_utilization * gpu_gib * GIB
        room = taken - weights - GIB
        if room < context:
            least = (weights + GIB + context) / gpu_gib / GIB
            raise AgileError(
                f"vllm.gpu_memory_utilization={vllm.gpu_memory_utilization:g} gives vLLM {taken / GIB:.1f} GiB, but "
                f"weights ({weights / GIB:.1f} GiB), 1 GiB to work in and one context of rollout.max_context_tokens="
                f"{play.max_context_tokens} ({context / GIB:.2f} GiB) need {least:.2f} of {gpu_gib:g} GiB. Raise it, "
                "or let servers on other GPUs play (rollout.policy=vllm-server)."
            )
        yield from vllm_items(weights, room, context, "what vllm.gpu_memory_utilization leaves")


def vllm_items(weights: float, cache: float, context: float, source: str) -> Iterator[Item]:
    """An engine of its own on the same GPU.

    Args:
        cache: Bytes of its keys and values.
        context: Those of the longest context.
        source: What says how large the cache is.
    """
    yield Item("vLLM's weights", weights, "of its own beside the trainer's")
    yield Item("vLLM's keys and values", cache, f"{source}: {cache / context:.0f} whole contexts")
    yield Item("vLLM's workspace", GIB, "assumed")


# --------------------------------------------------------------------------------------------------------------------
# What would make it fit


@dataclass(frozen=True, slots=True)
class Change:
    """Overrides of the config, or more GPUs, and what they cost."""

    overrides: tuple[str, ...]
    cost: str
    num_gpus: int | None = None

    def __str__(self) -> str:
        return " ".join((*self.overrides, *([f"--gpus {self.num_gpus}"] if self.num_gpus else [])))


def changes(config: RunConfig, num_gpus: int) -> Iterator[Change]:
    """What can be changed, the cheapest first."""
    engine, ppo, play = config.engine, config.ppo, config.rollout
    if not engine.gradient_checkpointing:
        yield Change(("engine.gradient_checkpointing=true",), "a third more computing in the update")
    tokens = max(config.sft.micro_batch_tokens, ppo.micro_batch_tokens) // 2
    while tokens >= play.max_context_tokens:
        yield Change((f"sft.micro_batch_tokens={tokens}", f"ppo.micro_batch_tokens={tokens}"), "more, smaller passes")
        tokens //= 2
    for stage in range(max(1, engine.zero_stage + 1), 4 if num_gpus > 1 else 1):
        yield Change((f"engine.zero_stage={stage}",), "more talk between GPUs")
    if ppo.kl_coef and ppo.reference == "keep":
        yield Change(("ppo.reference=offload",), "the reference moves at each iteration")
    if play.policy == "hf":
        yield Change((f"rollout.max_batch_size={max(1, play.max_batch_size // 4)}",), "fewer sessions at a time")
    elif config.vllm.kv_cache_gib is not None:
        yield Change((f"vllm.kv_cache_gib={config.vllm.kv_cache_gib / 2:g}",), "fewer sessions at a time")
    elif play.policy == "vllm":
        share = round(config.vllm.gpu_memory_utilization - 0.1, 2)
        yield Change((f"vllm.gpu_memory_utilization={share}",), "fewer sessions at a time")
    if engine.dtype == "float32":
        half = ("engine.dtype=bfloat16", f"engine.zero_stage={max(1, engine.zero_stage)}")
        yield Change(half, "rounding; rollout and trainer agree less")
    if config.model.critic == "separate":
        yield Change(("model.critic=shared",), "a critic that cannot change its trunk")
    if engine.offload == "none":
        yield Change(
            ("engine.offload=optimizer", f"engine.zero_stage={max(1, engine.zero_stage)}"),
            "steps on the CPU: seconds each",
        )
    if config.lora is None:
        yield Change(
            ("lora.rank=16", "model.critic=shared"), "trains adapters, not all weights; raise the learning rates"
        )
    if engine.offload != "all":
        yield Change(("engine.offload=all", "engine.zero_stage=3"), "weights come from the CPU at every layer: slow")
    for factor in (2, 4, 8):
        yield Change((), "more GPUs", factor * num_gpus)


def remedies(
    path: Path, overrides: Sequence[str], config: RunConfig, num_gpus: int, gpu_gib: float, action_share: float
) -> list[tuple[str, str, Plan]]:
    """Changes that make it fit, each planned anew: single ones, else the shortest row of the cheapest ones.

    Returns:
        For each what to add to the command, what it costs, and the plan with it; the cheapest first.
    """

    def planned(chosen: Sequence[Change]) -> Plan | None:
        words = [word for change in chosen for word in change.overrides]
        gpus = next((c.num_gpus for c in reversed(chosen) if c.num_gpus), num_gpus)
        try:
            return memory(load_config(path, [*overrides, *words]), gpus, gpu_gib, action_share)
        except AgileError:
            return None  # the change is not for this config

    candidates = list(changes(config, num_gpus))
    found = [(c, p) for c in candidates if (p := planned([c])) and p.fits]
    if found:
        return [(str(c), c.cost, p) for c, p in found[:4]]
    chosen: list[Change] = []
    best = planned([])
    for change in candidates:
        if (plan := planned([*chosen, change])) and (best is None or plan.total < best.total):
            chosen, best = [*chosen, change], plan
            if best.fits:
                break
    if best is None or not best.fits:
        return []
    for change in list(chosen):  # what a later one made needless
        rest = [c for c in chosen if c is not change]
        if (plan := planned(rest)) and plan.fits:
            chosen, best = rest, plan
    return [(" ".join(map(str, chosen)), "; ".join(dict.fromkeys(c.cost for c in chosen)), best)]


# --------------------------------------------------------------------------------------------------------------------


def run_plan(
    path: Path, overrides: Sequence[str], num_gpus: int, gpu_gib: float, action_share: float, console: Console
) -> bool:
    """Print the plan of a config and, if it does not fit, what would; returns whether it fits.

    Raises:
        AgileError: The config, the number of GPUs or the model cannot be planned for.
    """
    config = load_config(path, overrides)
    plan = memory(config, num_gpus, gpu_gib, action_share)
    table = Table(title=f"Memory of each of {num_gpus} GPUs of {gpu_gib:g} GiB", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    table.add_column("when")
    table.add_column("how", overflow="fold")
    for item in plan.items:
        table.add_row(item.name, f"{item.num_bytes / GIB:.2f}", item.when, item.note)
    table.add_section()
    table.add_row("total", f"{plan.total / GIB:.2f}", "at most", f"the largest: {plan.largest.name}")
    table.add_section()
    for item in plan.host:
        table.add_row(f"on the CPU: {item.name}", f"{item.num_bytes / GIB:.2f}", item.when, item.note)
    on_cpu = f"{at_most(plan.host) / GIB:.2f}"
    table.add_row("memory of the CPU", on_cpu, "at most", "for all GPUs together, were they on one node; data apart")
    console.print(table)
    room = (1 - MARGIN) * gpu_gib
    if plan.fits:
        console.print(
            f"It fits: {plan.total / GIB:.1f} of {room:.1f} GiB, which leaves {MARGIN:.0%} for fragmentation."
        )
        return True
    console.print(
        f"It does not fit: {plan.total / GIB:.1f} GiB, but {room:.1f} GiB can be used ({MARGIN:.0%} is margin)."
    )
    fitting = remedies(path, overrides, config, num_gpus, gpu_gib, action_share)
    for change, cost, other in fitting:
        console.print(f"  {change}: {other.total / GIB:.1f} GiB ({cost})", soft_wrap=True)
    if not fitting:
        console.print("No change that is known here makes it fit. Take GPUs with more memory, or a smaller model.")
    return False
