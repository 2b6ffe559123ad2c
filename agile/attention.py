"""Attention of tokens that stand in one line, by a plan of who sees whom.

All but attention works on each token alone, so tokens of many sequences go through a model as one sequence without
padding. `ATTENTION` is registered with transformers' `AttentionInterface`: a forward pass that is given a plan attends
by it, any other attends as SDPA does. `Runs` is the trainer's plan; sampling has one of its own (`policies/slots.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from agile.errors import AgileError

ATTENTION = "agile"
HALF = (torch.bfloat16, torch.float16)
MAX_HEAD = 256  # of flash attention
WASTE, SMALL = 1.25, 64**2  # padding of a group: scores beyond these are dearer than a group of their own
REMEDY = "Choose a model like Llama, Qwen or Mistral."

Ints = NDArray[np.int64]


class Plan(Protocol):
    """Who sees whom in one forward pass."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Of queries (1, H, N, D) to keys and values as the cache, if any, gave them back; (1, N, H, D)."""
        ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_plan: Plan | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if attention_plan is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None
    if strange := [n for n in ("softcap", "s_aux", "position_bias") if kwargs.get(n) is not None]:
        raise NotImplementedError(f"attention with {strange}")
    return attention_plan.attend(module, query, key, value, scaling, sliding_window), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def attend_by_plans(model: PreTrainedModel) -> str:
    """From now on the model attends by the plan of each pass; returns what it did before."""
    config = model.config.get_text_config()
    before: str = config._attn_implementation
    config._attn_implementation = ATTENTION
    return before


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Within it the model, which may be a trainer's, is in evaluation mode."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


@dataclass(frozen=True, slots=True)
class _Group:
    """Runs that are padded together within attention: B lines of Q queries and K keys.

    Attributes:
        line: Their queries' slice of the line, n tokens.
        shape: (B, Q, K).
        pad: (B * Q,) which of the n queries is there, any where there is none; None if all have Q.
        unpad: (n,) where each query is; None if all have Q.
        keys: (B * K,) which token of the line is the key there; None if the queries are the keys.
        position: (B, Q) how many keys stand before each query's own.
    """

    line: slice
    shape: tuple[int, int, int]
    pad: Tensor | None
    unpad: Tensor | None
    keys: Tensor | None
    position: Tensor

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """Of the line's (T, heads, D); (n, H, D). `visible` is (B, 1, Q, K), or None where all is causal."""
        lines, width, size = self.shape

        def padded(states: Tensor, index: Tensor | None, length: int) -> Tensor:
            chosen = states if index is None else states.index_select(0, index)
            return chosen.view(lines, length, *chosen.shape[1:]).transpose(1, 2)  # (B, heads, length, D)

        queries = padded(query[self.line], self.pad, width)
        keys, values = (
            padded(x[self.line], self.pad, width) if self.keys is None else padded(x, self.keys, size)
            for x in (key, value)
        )
        output, _ = sdpa_attention_forward(
            module, queries, keys, values, visible, scaling=scale, is_causal=visible is None
        )
        output = output.flatten(0, 1)
        return output if self.unpad is None else output.index_select(0, self.unpad)


class Runs:
    """A plan of runs: queries side by side that see, each, the keys of their run up to their own.

    On a GPU in half precision a pass over all runs is one call of flash attention with lengths of its own for queries
    and keys: by the package flash-attn, or else by torch where its own takes windows and grouped heads. That branch was
    run with a stand-in for these kernels alone, for want of a GPU. Everywhere else runs of like lengths are padded
    together, within attention alone, and go through SDPA.

    Args:
        places: For each run, in order, where its keys stand in the line, (K,).
        queries: For each run the numbers of those keys whose tokens are its queries, (Q,), ascending.
        begins: The first run of each group that is padded together, as `arrange` gives them.
        device: Where the model is.
        part: Whether the queries are but some of the line's tokens, or in another order.
    """

    def __init__(
        self,
        places: Sequence[Ints],
        queries: Sequence[Ints],
        begins: Sequence[int],
        device: torch.device,
        *,
        part: bool = False,
    ):
        self.places, self.queries, self.begins, self.device = places, queries, begins, device
        self.counts, self.sizes = (np.array([len(x) for x in of]) for of in (queries, places))
        self.alone = (self.counts == self.sizes) & (not part)  # whose keys are their queries' tokens
        self._visible: dict[tuple[int, int | None], Tensor | None] = {}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Of (1, heads, T, D); (1, T, H, D)."""
        if window is not None and window >= self.sizes.max():
            window = None
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        if _suits_flash(query) and (varlen := _varlen()) is not None:
            index, cu_q, cu_k, longest = self._lengths
            if index is not None:
                key, value = (x.index_select(0, index) for x in (key, value))
            return varlen(query, key, value, cu_q, cu_k, *longest, scale=scale, window=window)[None]
        outputs = [
            group.attend(module, query, key, value, self._seen(i, window), scale)
            for i, group in enumerate(self._groups)
        ]
        return (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None]

    @cached_property
    def _lengths(self) -> tuple[Tensor | None, Tensor, Tensor, tuple[int, int]]:
        """Which tokens of the line are the keys, if not the line itself; where runs begin in both; and the longest.

        Queries that are not side by side are runs of their own here: each must end with its last key.
        """
        counts, keys = [], []
        for places, queries in zip(self.places, self.queries, strict=True):
            for side_by_side in np.split(queries, np.flatnonzero(np.diff(queries) > 1) + 1):
                counts.append(len(side_by_side))
                keys.append(places[: side_by_side[-1] + 1])
        sizes = [len(k) for k in keys]
        cu_q, cu_k = (torch.from_numpy(np.cumsum([0, *x], dtype=np.int32)).to(self.device) for x in (counts, sizes))
        index = None if self.alone.all() else self._tensor(np.concatenate(keys))
        return index, cu_q, cu_k, (max(counts), max(sizes))

    @cached_property
    def _groups(self) -> list[_Group]:
        ends = np.cumsum(self.counts)
        groups = []
        for a, b in pairwise([*self.begins, len(self.counts)]):
            counts, sizes, first = self.counts[a:b], self.sizes[a:b], int(ends[a] - self.counts[a])
            lines, width, size = b - a, int(counts.max()), int(sizes.max())
            steps = np.arange(width)
            real = steps < counts[:, None]  # (B, Q)
            unpad = np.flatnonzero(real)
            pad = np.zeros(lines * width, np.int64)
            pad[unpad] = np.arange(len(unpad))
            keys, position = np.zeros((lines, size), np.int64), np.zeros((lines, width), np.int64)
            for line, places in zip(keys, self.places[a:b], strict=True):
                line[: len(places)] = places
            position[real] = np.concatenate(self.queries[a:b])  # where there is no query, any that sees something
            alone, equal = bool(self.alone[a:b].all()), bool(real.all())
            groups.append(
                _Group(
                    slice(first, int(ends[b - 1])),
                    (lines, width, size),
                    None if equal else self._tensor(pad),
                    None if equal else self._tensor(unpad),
                    None if alone else self._tensor(keys.ravel()),
                    self._tensor(position),
                )
            )
        return groups

    def _seen(self, i: int, window: int | None) -> Tensor | None:
        """Which keys each query of a group sees, (B, 1, Q, K); None if the queries are the keys and see all before."""
        group = self._groups[i]
        if group.keys is None and window is None:
            return None
        if (i, window) not in self._visible:
            key, position = torch.arange(group.shape[2], device=self.device), group.position[:, None, :, None]
            seen = key <= position
            self._visible[i, window] = seen if window is None else seen & (key > position - window)
        return self._visible[i, window]

    def _tensor(self, array: Ints) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def arrange(counts: Ints, sizes: Ints) -> tuple[Ints, list[int]]:
    """In which order runs stand in the line, those without a query left out, and where groups of like ones begin.

    Args:
        counts, sizes: (R,), the queries and keys of each run.

    Returns:
        The numbers of the runs, in order; and the places in it where groups begin.
    """
    order = np.lexsort((counts, sizes, counts < sizes))
    order = order[counts[order] > 0]
    begins: list[int] = []
    real = width = 0
    for i, run in enumerate(order):
        count, size = int(counts[run]), int(sizes[run])
        real, width = real + count * size, max(width, count)
        area = (i - begins[-1] + 1) * width * size if begins else 0
        alone = count == size
        if not begins or area > WASTE * real + SMALL or alone != (counts[order[i - 1]] == sizes[order[i - 1]]):
            begins.append(i)
            real, width = count * size, count
    return order, begins


def _suits_flash(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in HALF and query.shape[-1] <= MAX_HEAD


@cache
def _varlen() -> Callable[..., Tensor] | None:
    """Flash attention over runs, of (queries, keys, values, cu_q, cu_k, max_q, max_k, scale, window), if there is one.

    Both align a run's queries with the last of its keys.
    """
    found: Callable[..., Any]
    try:  # an extra of one's own: it must suit the GPU
        found = import_module("flash_attn").flash_attn_varlen_func
    except ImportError:
        pass
    else:
        return lambda *runs, scale, window: found(
            *runs, softmax_scale=scale, causal=True, window_size=(_left(window), 0)
        )
    try:
        found = import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    if not {"window_size", "enable_gqa"} <= inspect.signature(found).parameters.keys():
        return None
    return lambda *runs, scale, window: found(*runs, scale=scale, window_size=(_left(window), 0), enable_gqa=True)


def _left(window: int | None) -> int:
    """How many keys before its own a query sees, as flash attention counts."""
    return -1 if window is None else window - 1


@dataclass(slots=True)
class Line:
    """The trainer's plan of a pass over a line of tokens, of which some are read.

    Attributes:
        runs: How all of them attend.
        read: (n,) those whose last hidden states are read.
        reads: How these attend in a last layer that computes nothing else.
        cut: Whether the last layer was such a one; set by the pass.
    """

    runs: Runs
    read: Tensor
    reads: Runs
    cut: bool = False

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        return self.runs.attend(module, query, key, value, scale, window)


class _Reads:
    """In the last layer: asked once for all tokens, for the sake of their keys and values; then for those read."""

    def __init__(self, runs: Runs):
        self.runs = runs
        self.held: tuple[Tensor, Tensor] | None = None

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        if self.held is None:
            self.held = key, value
            return query.transpose(1, 2)  # any of this shape
        key, value = self.held
        return self.runs.attend(module, query, key, value, scale, window)


def _only_reads(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Before a last layer: it is given the tokens that are read, and of all others their keys and values."""
    plan = kwargs.get("attention_plan")
    if not isinstance(plan, Line):
        return None
    plan.cut = True
    (hidden,) = args
    kwargs = {**kwargs, "attention_plan": _Reads(plan.reads)}
    layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)
    cos, sin = (x.index_select(1, plan.read) for x in kwargs["position_embeddings"])
    kwargs |= {"position_embeddings": (cos, sin), "position_ids": kwargs["position_ids"].index_select(1, plan.read)}
    return (hidden.index_select(1, plan.read),), kwargs


def hidden_states(trunk: nn.Module, input_ids: Tensor, position_ids: Tensor, plan: Line) -> Tensor:
    """The last hidden states (n, H) of the tokens that are read in a line of tokens, ids and positions (T,)."""
    output = trunk(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        attention_mask=input_ids.new_zeros(1, 1, 1, 1),  # nobody reads it; without one, models would make their own
        use_cache=False,
        attention_plan=plan,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden if plan.cut else hidden.index_select(0, plan.read)


def check_layers(model: PreTrainedModel, remedy: str) -> None:
    """Whether attention is all that passes between tokens, and each sees all before it or those in a window.

    Raises:
        AgileError: It is not.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if getattr(model, "_is_stateful", False) or kinds - {"full_attention", "sliding_attention"}:
        raise AgileError(
            f"{type(model).__name__} keeps more than keys and values of each token ({sorted(kinds) or 'a state'}). "
            f"{remedy}"
        )


def prepare_runs(model: PreTrainedModel) -> None:
    """Let the last layer leave out what nobody reads, where it can; and see that runs are what rows are on their own.

    Raises:
        AgileError: They are not, or the model fails.
    """
    check_layers(model, REMEDY)
    layers = getattr(model.base_model, "layers", None)
    if layers is not None and all(hasattr(layers[-1], name) for name in ("self_attn", "input_layernorm")):
        hook = layers[-1].register_forward_pre_hook(_only_reads, with_kwargs=True)
        if _run_problem(model) is None:
            return
        hook.remove()
    if problem := _run_problem(model):
        raise AgileError(
            f"{type(model).__name__} cannot read sequences that lie in one line without padding ({problem}): its "
            f"attention is not the usual one of transformers. {REMEDY}"
        )


def _run_problem(model: PreTrainedModel) -> str | None:
    """What is wrong with two short rows with a common beginning, in one line, beside plain forward passes of each."""
    places = [np.array([0, 1, 2, 3]), np.array([0, 1, 4, 5])]
    queries, read = [np.arange(4), np.array([2, 3])], [np.array([1, 3]), np.array([2])]
    ids, positions = torch.tensor([[0, 1, 2, 3, 3, 2], [0, 1, 2, 3, 2, 3]], device=model.device)
    plan = Line(
        Runs(places, queries, [0, 1], model.device),
        torch.tensor([1, 3, 4], device=model.device),
        Runs(places, read, [0], model.device, part=True),
    )
    try:
        with torch.no_grad(), evaluation(model):
            own = [
                model.base_model(input_ids=ids[None, p]).last_hidden_state[0, r]
                for p, r in zip(places, read, strict=True)
            ]
            before = attend_by_plans(model)
            try:
                found = hidden_states(model.base_model, ids, positions, plan)
            finally:
                model.config.get_text_config()._attn_implementation = before
        expected = torch.cat(own)
        if torch.allclose(found, expected, rtol=0.0, atol=0.05 * float(expected.std()) + 1e-6):
            return None
        return f"hidden states differ by up to {float((found - expected).abs().max()):.2g}"
    except Exception as error:
        return str(error)
