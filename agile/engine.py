"""DeepSpeed as the engine: the same calls in one process and under a launcher."""

from __future__ import annotations

import json
import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import PreTrainedModel

from agile import ranks
from agile.errors import AgileError
from agile.lora import adapter_weights, plain_parameters

logger = logging.getLogger(__name__)

# what torch and DeepSpeed raise for a checkpoint of another shape, torn, empty or gone
_UNREADABLE = (RuntimeError, KeyError, ValueError, AssertionError, EOFError, OSError, pickle.UnpicklingError)

# the remedy for a damaged checkpoint, before its folder
REMOVE = "--resume goes on from the checkpoint before a damaged one, or anew, once you have removed "


def _join_processes() -> None:
    """Without a launcher there is one process: it needs no port, which two runs could fight over."""
    ranks.join()
    if "RANK" in os.environ:
        return
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.distributed.is_initialized():  # by vLLM
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # documented, but not in __all__
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def _checkpointed_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model that compute again for the gradient while they are in training mode.

    Raises:
        AgileError: Its model has none.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for part in module.modules():
        if isinstance(part, PreTrainedModel) and part.supports_gradient_checkpointing:
            part.gradient_checkpointing_enable({"use_reentrant": False})
    found: list[nn.Module] = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not found:
        raise AgileError(
            "engine.gradient_checkpointing is set, but this model has no layers that transformers can compute again. "
            "Set engine.gradient_checkpointing=false, and shorten sequences or batches if memory is short."
        )
    return found


class Engine:
    """A module under DeepSpeed with AdamW, clipping and a learning-rate schedule.

    Under a launcher each process has an engine, calls the same methods in the same order, and runs forward and backward
    equally often; gradients are summed over the processes.

    Args:
        module: What is trained.
        groups: Parameter groups of AdamW with learning rates of their own; all parameters at `lr` by default.
        schedule: Factor on `lr` at each optimizer step, from 0.
        zero_stage: What DeepSpeed's ZeRO shards over the processes: 0 nothing, 1 the optimizer's state, 2 gradients
            too, 3 parameters too.
        offload: What lies in the memory of the CPU: nothing, the optimizer's state and its step, or parameters too.
        dtype: What the module computes in; the optimizer keeps its weights in float32.
        gradient_checkpointing: Whether the layers of a transformers model are computed again for the gradient, in place
            of keeping what they computed.
        skip_above: Gradient norm before clipping above which a step changes nothing; None for no such limit. A step
            whose gradient is not finite never changes anything.
        max_skipped: Such steps in a row that end the run.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float,
        groups: list[dict[str, Any]] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        schedule: Callable[[int], float] = lambda step: 1.0,
        zero_stage: int = 0,
        offload: str = "none",
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        skip_above: float | None = None,
        max_skipped: int = 5,
    ):
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        _join_processes()
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # ZeRO calls torch by names that torch will drop, and torch would say so at every step
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        if not torch.cuda.is_available():
            # compiled at first start, needs a C++ compiler, and only speeds up what several processes say to each other
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        optimizer = torch.optim.AdamW(
            groups or module.parameters(), lr=lr, betas=betas, weight_decay=weight_decay, fused=True
        )
        self._groups: list[list[nn.Parameter]] = [list(g["params"]) for g in optimizer.param_groups]
        for number, group in enumerate(optimizer.param_groups):  # ZeRO replaces lists and puts other parameters in
            group["number"] = number
        self._hidden: list[tuple[dict[str, Any], list[Tensor]]] = []
        optimizer.register_step_pre_hook(self._hide_frozen)
        optimizer.register_step_post_hook(self._show_frozen)
        self._checkpointed = _checkpointed_layers(module) if gradient_checkpointing else []
        on_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero: dict[str, Any] = {"stage": zero_stage}
        if offload != "none":
            zero["offload_optimizer"] = on_cpu
        if offload == "all":
            zero["offload_param"] = on_cpu
        self._factor, self._max_grad_norm = 1.0, max_grad_norm
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._factor * schedule(step))
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=self._scheduler,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": max_grad_norm if zero_stage else 0.0,
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # it would be compiled at first start
                "bf16": {"enabled": dtype == "bfloat16"},
                "steps_per_print": 10**9,
            },
        )
        self.lr = lr  # of the last step, in the first group
        self.skip_above = float("inf") if skip_above is None else skip_above
        self.max_skipped = max_skipped
        self.num_skipped = 0
        self._skipped_in_a_row = 0
        self._norm = 0.0
        self.zero_stage = zero_stage
        self.dtype = dtype

    @property
    def module(self) -> Any:
        return self._engine.module

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    def forward(self, *args: Any) -> Any:
        """Of arguments on the engine's device."""
        for layer in self._checkpointed:  # these alone, so that no dropout awakes
            layer.training = torch.is_grad_enabled()
        try:
            return self._engine(*args)
        finally:
            for layer in self._checkpointed:
                layer.training = False

    def scale_lr(self, factor: float) -> None:
        """Take steps from now on at `factor` times every learning rate, whatever it was before."""
        self._factor = factor
        step = self._scheduler.last_epoch
        for group, base, schedule in zip(
            self.optimizer.param_groups, self._scheduler.base_lrs, self._scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * schedule(step)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; `last` marks the last micro-batch before `step`.

        Losses are summed, not averaged, over micro-batches and processes.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * ranks.world_size(), scale_wrt_gas=False)  # DeepSpeed takes the mean over processes

    def step(self) -> float:
        """One optimizer step; returns the norm, before clipping, of the gradient of all processes' losses.

        Parameter groups of which nothing requires a gradient stay as they are, their momentum too. So does everything
        in a step that is skipped: `num_skipped` counts it, on every process alike, for the norm is that of all. The
        schedule of learning rates goes on: a step is a step.

        Raises:
            AgileError: The last `max_skipped` steps were skipped.
        """
        if not self._sharded:
            trained = [p for p in self._engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(p.grad for p in trained)
            torch.nn.utils.clip_grads_with_norm_(trained, self._max_grad_norm, norm)
            self._norm = float(norm)
        self.lr = float(self.optimizer.param_groups[0]["lr"])
        place = self._scheduler.last_epoch
        self._engine.step()
        if self._scheduler.last_epoch == place:  # so ZeRO leaves it where the gradient is not finite
            self._scheduler.step()
        if self._sharded:  # ZeRO takes gradients away; it too leaves out a step that is not finite
            self._norm = float(self._engine.get_global_grad_norm())
        self._count_skipped()
        return self._norm

    @property
    def skipped(self) -> bool:
        """Whether the last step changed nothing. ZeRO says -1 for a norm that is not finite."""
        return not 0 <= self._norm <= self.skip_above or self._norm == float("inf")

    def _count_skipped(self) -> None:
        if not self.skipped:
            self._skipped_in_a_row = 0
            return
        self.num_skipped += 1
        self._skipped_in_a_row += 1
        found = f"{self._norm:.3g}" if 0 <= self._norm < float("inf") else "not finite"
        logger.warning("An optimizer step was skipped, its gradient norm is %s (%d so far).", found, self.num_skipped)
        if self._skipped_in_a_row >= self.max_skipped:
            raise AgileError(
                f"{self._skipped_in_a_row} optimizer steps in a row were skipped (guard.max_skipped_steps), the last "
                f"with a gradient norm that is {found}; nothing was learned from them. Lower the learning rate, look "
                "for rewards or texts that are out of bounds, or raise guard.max_grad_norm; --resume goes on from the "
                "last checkpoint."
            )

    @property
    def _sharded(self) -> bool:
        return self.zero_stage > 0

    def _hide_frozen(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before AdamW steps: ZeRO would give parameters without a gradient one of zeros, and they would decay.

        In a step that is skipped all are hidden; ZeRO has the norm by then.
        """
        if self._sharded:
            self._norm = float(self._engine.optimizer._global_grad_norm)
        for group in optimizer.param_groups:
            if self.skipped or not any(p.requires_grad for p in self._groups[group["number"]]):
                self._hidden.append((group, group["params"]))
                group["params"] = []

    def _show_frozen(self, *_: Any) -> None:
        while self._hidden:
            group, group["params"] = self._hidden.pop()

    def weights(self, prefix: str = "lm.") -> Iterator[tuple[str, Tensor]]:
        """Every parameter below `prefix`, by its name without it, tied ones under each of their names.

        An adapter is merged into what is given out, not into what is trained: the names are those of the plain model.
        Each is valid only until the next is asked for. Under ZeRO 3 it is gathered from all processes for that time, so
        all of them must walk through all weights.
        """
        for name, parts, value in plain_parameters(self._engine.module.get_submodule(prefix.removesuffix("."))):
            with self._gathered(parts):
                yield name, value()

    def adapter_weights(self, prefix: str = "lm.") -> Iterator[tuple[str, Tensor]]:
        """The parameters of the adapter alone, as `weights` gives all; none without one."""
        for name, parameter in adapter_weights(self._engine.module.get_submodule(prefix.removesuffix("."))):
            with self._gathered([parameter]):
                yield name, parameter.detach()

    def _gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        sharded = [p for p in parameters if hasattr(p, "ds_id")]  # DeepSpeed's mark
        if not sharded:
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(sharded)
        return gathered

    def save(self, folder: Path, tag: str) -> None:
        """Write weights, optimizer and schedule to `<folder>/<tag>`.

        Raises:
            OSError: It could not be written.
        """
        try:
            counts = {"num_skipped": self.num_skipped, "skipped_in_a_row": self._skipped_in_a_row}
            self._engine.save_checkpoint(str(folder), tag=tag, client_state=counts, save_latest=False)
        except RuntimeError as error:  # so torch reports a full disk
            raise OSError(f"the checkpoint was not written ({error})") from error
        if ranks.is_main():
            (folder / f"{tag}.json").write_text(json.dumps(self._layout))

    @property
    def _layout(self) -> dict[str, Any]:
        """What must be the same where a checkpoint is loaded."""
        return {"processes": ranks.world_size(), "zero_stage": self.zero_stage, "dtype": self.dtype}

    def load(self, folder: Path, tag: str) -> None:
        """Restore weights, optimizer and schedule.

        Raises:
            AgileError: The checkpoint is missing, of another shape, or cannot be read.
        """
        if not (folder / tag).is_dir():
            raise AgileError(f"There is no checkpoint {tag} in {folder}. Name a folder that `agile train` wrote.")
        self._check_layout(folder / f"{tag}.json")
        try:
            _, counts = self._engine.load_checkpoint(str(folder), tag=tag)
        except _UNREADABLE as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise AgileError(
                f"The checkpoint {folder / tag} is damaged or does not fit this model. Use the model and tokenizer "
                f"sections it was made with (config.yaml of its run). {REMOVE}{folder}. "
                f"{reason[:500]}"
            ) from None
        self.num_skipped, self._skipped_in_a_row = counts["num_skipped"], counts["skipped_in_a_row"]

    def _check_layout(self, path: Path) -> None:
        checkpoint = path.with_suffix("")
        try:
            saved = json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise AgileError(f"{path} is damaged: it is no JSON ({error}). {REMOVE}{path.parent}.") from None
        ranks.check_same_number(f"The checkpoint {checkpoint}", saved.get("processes", ranks.world_size()))
        for name, value in self._layout.items():
            if saved.get(name, value) != value:
                raise AgileError(
                    f"The checkpoint {checkpoint} was written with engine.{name}={saved[name]}, but now it is {value}; "
                    f"what was saved cannot be cut anew. Go on with engine.{name}={saved[name]}, or start another run "
                    "from the agents it exported: model.path=RUN/sft (docs/training.md)."
                )

    def close(self) -> None:
        """Let go of the module, so that this engine's memory is freed and, but for ZeRO 3, another can take it over."""
        self._engine.module_forward_pre_hook.remove()
        self._engine.module_forward_post_hook.remove()
        self._engine.destroy()
