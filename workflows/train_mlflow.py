"""A training run in MLflow: the scalars that TensorBoard gets, under the run's own name. An extra, `perceptio[mlflow]`.

Nothing of MLflow is imported where `train.mlflow` is null.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from schemas.recipe import Recipe
from workflows.store import StageError
from workflows.train_board import scalars

TAG = "perceptio.run"  # names the run to the run that goes on with it
STEP = "run/tokens"  # a scalar that every step has
AT_ONCE = 1000  # metrics of one request, MLflow's own limit
UNNAMEABLE = re.compile(r"[^\w\-. /]")

log = logging.getLogger(__name__)


def require_mlflow(address: str | None) -> None:
    """Raises StageError where there is an address and no MLflow to log to it."""
    if address is not None and importlib.util.find_spec("mlflow") is None:
        raise StageError(
            "train.mlflow is set, but the package mlflow is not installed: pip install 'perceptio[mlflow]' here and"
            " where workers run, or set train.mlflow to null"
        )


class Tracker:
    """One run of a tracking server: found again by name where a training goes on, made where it begins.

    Metrics are sent from a thread, so that no step waits for the server. What could not be sent is kept, said once, and
    sent with what comes next. Steps that a resumed run takes again are logged again. Raises what MLflow raises where
    the server is not there at the start.
    """

    def __init__(self, recipe: Recipe, run: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.tracking import MlflowClient  # an extra

        self._client = MlflowClient(tracking_uri=recipe.train.mlflow)
        self._run = self._run_of(recipe, run)
        self._waiting: list[Any] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._sending: Future[None] | None = None
        self._failed = False

    def begin(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Adds what the server lacks of the lines that a resumed run goes on from."""
        known = max((point.step for point in self._client.get_metric_history(self._run, STEP)), default=0)
        for line in lines:
            if line["step"] > known:
                self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds a line of metrics.jsonl, to be sent with the next `write`."""
        self.add_scalars(line["step"], scalars(line))

    def add_scalars(self, step: int, named: Iterable[tuple[str, float]]) -> None:
        """Adds some scalars of a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(UNNAMEABLE.sub("_", name), float(value), now, step) for name, value in named]

    def write(self) -> None:
        """Begins to send what is waiting, unless the thread still sends."""
        if self._sending is None or self._sending.done():
            self._sending = self._pool.submit(self._send)

    def close(self) -> None:
        """Sends the rest and ends the run; warns where something could not be sent."""
        self._pool.submit(self._send).result()
        self._pool.shutdown()
        if self._waiting:
            log.warning("train.mlflow: %d values were not sent, see above; metrics.jsonl has them", len(self._waiting))
            return
        try:
            self._client.set_terminated(self._run)
        except Exception as error:  # noqa: BLE001  # as below
            log.warning("train.mlflow: all was sent, but the run does not count as finished: %s", error)

    def _send(self) -> None:
        while self._waiting:
            part = self._waiting[:AT_ONCE]
            try:
                self._client.log_batch(self._run, metrics=part)
            except Exception as error:  # noqa: BLE001  # whatever its transport raises: a training outlives its board
                if not self._failed:
                    log.warning("train.mlflow: %d values wait, the server did not take them: %s", len(part), error)
                self._failed = True
                return
            self._failed = False
            del self._waiting[: len(part)]

    def _run_of(self, recipe: Recipe, run: str) -> str:
        """The id of the run of that name, in the experiment that is called as the recipe is."""
        experiment = self._client.get_experiment_by_name(recipe.name)
        where = self._client.create_experiment(recipe.name) if experiment is None else experiment.experiment_id
        found = self._client.search_runs([where], f"tags.`{TAG}` = '{run}'", max_results=1)
        if found:
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            return str(found[0].info.run_id)
        made = str(self._client.create_run(where, run_name=run, tags={TAG: run}).info.run_id)
        for name, value in _params(recipe).items():
            self._client.log_param(made, name, value)
        return made


def _params(recipe: Recipe) -> dict[str, Any]:
    """What tells runs apart, as the run began."""
    train, model = recipe.train, recipe.model
    names = ("steps", "global_batch", "micro_batch", "zero_stage", "precision", "learning_rate", "weight_decay")
    found: dict[str, Any] = {"recipe": recipe.name, "seed": recipe.seed, "base": model.base, "language": model.language}
    found |= {name: getattr(train, name) for name in names}
    if model.lora is not None and model.language == "lora":
        found["lora_rank"] = model.lora.rank
    return found | {f"weight/{UNNAMEABLE.sub('_', entry.called)}": entry.weight for entry in train.mixture}
