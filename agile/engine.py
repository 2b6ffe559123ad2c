"""DeepSpeed as the engine: one process here, the same calls under a launcher."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from agile.errors import AgileError

# what torch and DeepSpeed raise for a checkpoint of another shape, torn, empty or gone
_UNREADABLE = (RuntimeError, KeyError, ValueError, AssertionError, EOFError, OSError, pickle.UnpicklingError)


def _join_processes() -> None:
    """Without a launcher there is one process: it needs no port, which two runs could fight over."""
    if "RANK" in os.environ:
        return
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.distributed.is_initialized():  # by vLLM
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # documented, but not in __all__
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


class Engine:
    """A module under DeepSpeed with AdamW, clipping and a learning-rate schedule.

    Args:
        module: What is trained.
        groups: Parameter groups of AdamW with learning rates of their own; all parameters at `lr` by default.
        schedule: Factor on `lr` at each optimizer step, from 0.
        zero_stage: What DeepSpeed's ZeRO shards over the processes: 0 nothing, 1 the optimizer's state, 2 gradients
            too, 3 parameters too.
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
    ):
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        _join_processes()
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if not torch.cuda.is_available():
            # compiled at first start, needs a C++ compiler, and only speeds up what several processes say to each other
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        optimizer = torch.optim.AdamW(groups or module.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": max_grad_norm,
                "zero_optimization": {"stage": zero_stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
        )
        self.lr = lr  # of the last step, in the first group
        self.zero_stage = zero_stage

    @property
    def module(self) -> Any:
        return self._engine.module

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    def forward(self, *args: Any) -> Any:
        """Of arguments on the engine's device."""
        return self._engine(*args)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; `last` marks the last micro-batch before `step`. Losses are summed, not averaged."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """One optimizer step; returns the gradient norm before clipping."""
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        self.lr = float(self.optimizer.param_groups[0]["lr"])
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if self.zero_stage else norm  # ZeRO takes gradients away

    def weights(self, prefix: str = "lm.") -> Iterator[tuple[str, Tensor]]:
        """Every parameter below `prefix`, by its name without it, tied ones under each of their names.

        Each is valid only until the next is asked for. Under ZeRO 3 it is gathered from all processes for that time, so
        all of them must walk through all weights.
        """
        for name, parameter in self._engine.module.named_parameters(remove_duplicate=False):
            if name.startswith(prefix):
                with self._gathered(parameter):
                    yield name.removeprefix(prefix), parameter.detach()

    def _gathered(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        if not hasattr(parameter, "ds_id"):  # DeepSpeed's mark of a sharded parameter
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter])
        return gathered

    def save(self, folder: Path, tag: str) -> None:
        """Write weights, optimizer and schedule to `<folder>/<tag>`.

        Raises:
            OSError: It could not be written.
        """
        try:
            self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        except RuntimeError as error:  # so torch reports a full disk
            raise OSError(f"the checkpoint was not written ({error})") from error

    def load(self, folder: Path, tag: str) -> None:
        """Restore weights, optimizer and schedule.

        Raises:
            AgileError: The checkpoint is missing, of another shape, or cannot be read.
        """
        if not (folder / tag).is_dir():
            raise AgileError(f"There is no checkpoint {tag} in {folder}. Name a folder that `agile train` wrote.")
        try:
            self._engine.load_checkpoint(str(folder), tag=tag)
        except _UNREADABLE as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise AgileError(
                f"The checkpoint {folder / tag} is damaged or does not fit this model. Use the model and tokenizer "
                f"sections it was made with (config.yaml of its run). {reason[:500]}"
            ) from None

    def close(self) -> None:
        """Let go of the module, so that another engine can take it over and this one's memory is freed."""
        self._engine.module_forward_pre_hook.remove()
        self._engine.module_forward_post_hook.remove()
        self._engine.destroy()
