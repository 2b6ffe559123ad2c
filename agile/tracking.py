"""A run's numbers in TensorBoard, W&B and MLflow, by the trackers of `accelerate`."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agile.errors import AgileError

logger = logging.getLogger(__name__)


def check_installed(names: Sequence[str]) -> None:
    """Whether the packages of these trackers are there.

    Raises:
        AgileError: One is missing.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise AgileError(
                f"tracking.trackers has {name}, but the package {name} is not installed. Install it with "
                f'`pip install -e ".[{name}]"`, or take it out of tracking.trackers.'
            )


class Tracking:
    """Sends what metrics.jsonl gets to trackers too. One that fails is warned of and left out; the run goes on.

    Nothing starts before the first `log`. A run that goes on is the same run there, by the ids in `tracking.json`, and
    steps that it does again are not sent again.

    Args:
        names: Of the trackers: tensorboard, wandb, mlflow.
        folder: The run folder.
        project: W&B's project, MLflow's experiment.
        run_name: How the run is shown there.
        settings: The config, logged once as hyper-parameters.
        last_steps: For each stage its last step in metrics.jsonl.
        num_lines: Lines of metrics.jsonl.
        num_sent: Lines that it had before it was cut back to the checkpoint.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        project: str,
        run_name: str,
        settings: Mapping[str, Any],
        last_steps: Mapping[str, int],
        num_lines: int,
        num_sent: int,
    ):
        self._names = list(names)
        self._folder, self._project, self._run_name = folder, project, run_name
        self._settings = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        self._last_steps = last_steps
        self._num_lines = num_lines
        self._trackers: dict[tuple[str, str], Any] = {}
        self._file = folder / "tracking.json"
        self._kept = self._read()
        self._known = self._kept.keys() - {"tensorboard"}  # that have what was sent
        if self._kept:  # a second kill may come before the place of the first is reached
            self._keep(num_sent=max(num_sent, self._kept["num_sent"]))

    def log(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """The numbers among `metrics` as `<stage>/<name>`."""
        self._num_lines += 1
        numbers = {f"{stage}/{k}": v for k, v in metrics.items() if isinstance(v, int | float)}
        for name in tuple(self._names):
            try:
                self._send(name, stage, step, numbers)
            except Exception as error:  # each library has its own, and the network's
                self._names.remove(name)
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                logger.warning("%s is left out from here on; metrics.jsonl has everything. %s", name, reason)

    def _send(self, name: str, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        # what was sent and is done again; TensorBoard's own way (purge_step) also mends what a kill has torn
        if name in self._known and self._num_lines <= self._kept.get("num_sent", 0):
            return
        # TensorBoard has a folder for each stage: all count their steps from 1
        key = (name, stage if name == "tensorboard" else "")
        if key not in self._trackers:
            tracker = self._start(name, stage)
            tracker.start()
            if name not in self._kept:
                tracker.store_init_configuration(self._settings)
            self._trackers[key] = tracker
            self._keep(**{name: _run_id(name, tracker)})
        if name == "wandb":  # its own steps must rise over all stages; a stage is drawn over those of the stage
            run = self._trackers[key].tracker
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._trackers[key].log({**numbers, f"{stage}/step": step}, step=self._num_lines)
        else:
            self._trackers[key].log(dict(numbers), step=step)

    def _start(self, name: str, stage: str) -> Any:
        from accelerate import PartialState
        from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker

        PartialState()  # its trackers ask it which process this is
        known = self._kept.get(name)
        if name == "tensorboard":
            first = self._last_steps.get(stage, 0) + 1
            return TensorBoardTracker(stage, self._folder / "tensorboard", purge_step=first)
        if name == "wandb":
            run_id = known or uuid.uuid4().hex[:12]
            return WandBTracker(self._project, name=self._run_name, id=run_id, resume="allow", dir=str(self._folder))
        return MLflowTracker(self._project, run_name=self._run_name, run_id=known)

    def _read(self) -> dict[str, Any]:
        try:
            kept: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}
        except ValueError:
            raise AgileError(
                f"{self._file} is damaged: it is no JSON. Remove it; W&B and MLflow then show what follows as a run of "
                "its own."
            ) from None
        return kept

    def _keep(self, **values: Any) -> None:
        self._kept = {"num_sent": 0, **self._kept, **values}
        draft = self._file.with_suffix(".tmp")
        draft.write_text(json.dumps(self._kept))
        os.replace(draft, self._file)

    def close(self) -> None:
        for (name, _), tracker in self._trackers.items():
            try:
                tracker.finish()
            except Exception as error:
                logger.warning("%s could not end the run: %s", name, error)
        self._trackers = {}


def _run_id(name: str, tracker: Any) -> str:
    """What the tracker calls this run; TensorBoard knows runs by their folders."""
    if name == "mlflow":
        return str(tracker.tracker.info.run_id)
    return str(tracker.tracker.id) if name == "wandb" else ""
