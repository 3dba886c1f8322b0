"""MLflow as an extra: what a run logs there, how it goes on, and what is said where the package is missing."""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perceptio.train.step import StepReport
from schemas.recipe import Recipe
from schemas.recipe_file import RecipeError, load_recipe
from tests.mixtures import vqa_and_boxes
from workflows import train
from workflows.store import Root, StageError, open_root
from workflows.train_board import scalars
from workflows.train_log import TrainLog, read_metrics
from workflows.train_mlflow import Tracker, require_mlflow
from workflows.train_samples import Shown

ROOMS = Path(__file__).parents[2] / "workflows" / "recipes" / "rooms.yaml"
RUN = "0123456789abcdef"
TERMS = {"text": 0.5, "mask_bce": 0.25}
REPORT = StepReport(1.5, TERMS, {"vqa": {"text": 0.5}}, 2.0, {"vqa": 6, "boxes": 2}, 900, "0" * 16)


def recipe_with(address: str, **settings: object) -> Recipe:
    lines = [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]
    return load_recipe(ROOMS, overrides=[f"train.mlflow={address}", *lines])


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """One that is tracked in a file of its own; skips where the extra is not installed."""
    pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed: pip install 'perceptio[mlflow]'")
    return recipe_with(f"sqlite:///{tmp_path / 'mlruns.db'}")


def attempt(root: Root, recipe: Recipe, first_step: int) -> TrainLog:
    return TrainLog(root, RUN, first_step, workers=2, mixture=vqa_and_boxes(), tracker=Tracker(recipe, RUN))


def add(log: TrainLog, *steps: int) -> None:
    for step in steps:
        log.add(step, REPORT, learning_rate=0.1 / step, waited=0.5)


def run_in(recipe: Recipe) -> tuple[Any, Any]:
    """The client, and the recipe's one run."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=recipe.train.mlflow)
    (run,) = client.search_runs([client.get_experiment_by_name(recipe.name).experiment_id])
    return client, run


def steps_of(client: Any, run: Any, name: str) -> list[int]:
    return sorted(point.step for point in client.get_metric_history(run.info.run_id, name))


def test_it_gets_the_scalars_of_tensorboard(tmp_path: Path, recipe: Recipe) -> None:
    root = open_root(str(tmp_path))
    log = attempt(root, recipe, 0)
    add(log, 1, 2)
    log.close()
    client, run = run_in(recipe)
    assert run.info.run_name == RUN and run.info.status == "FINISHED"
    assert run.data.metrics == pytest.approx(dict(scalars(read_metrics(root, RUN)[-1])))
    assert {"run/loss", "loss/text", "text/vqa", "share_so_far/vqa"} <= run.data.metrics.keys()
    assert steps_of(client, run, "run/loss") == [1, 2]
    assert run.data.params["global_batch"] == "32" and run.data.params["weight/referring"] == "8.0"


def test_a_resumed_run_goes_on_in_the_same_run_which_then_lacks_nothing(tmp_path: Path, recipe: Recipe) -> None:
    root = open_root(str(tmp_path))
    first = attempt(root, recipe, 0)
    add(first, 1, 2)
    first.write()
    assert first.tracker is not None and first.tracker._sending is not None
    first.tracker._sending.result()
    first.tracker = None  # what comes now is lost with its worker, and in metrics.jsonl alone
    add(first, 3)
    first.show(Shown({"well_formed": 0.5}, Image.new("RGB", (8, 8))))
    add(first, 4)
    first.write()
    second = attempt(root, recipe, 3)
    add(second, 4, 5)
    second.close()
    client, run = run_in(recipe)
    assert steps_of(client, run, "run/loss") == [1, 2, 3, 4, 5]
    assert steps_of(client, run, "generated/well_formed") == [3]


def test_a_server_that_is_away_holds_nothing_up_and_loses_nothing(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = attempt(open_root(str(tmp_path)), recipe, 0)
    tracker = log.tracker
    assert tracker is not None

    def away(*_: Any, **__: Any) -> None:
        raise OSError("connection refused")

    with monkeypatch.context() as gone:
        gone.setattr(tracker._client, "log_batch", away)
        for step in (1, 2, 3):
            add(log, step)
            log.write()
            assert tracker._sending is not None
            tracker._sending.result()
    assert len(re.findall("the server did not take them: connection refused", caplog.text)) == 1, "said once"
    log.close()
    client, run = run_in(recipe)
    assert steps_of(client, run, "run/loss") == [1, 2, 3]
    assert run.info.status == "FINISHED"


def test_what_was_never_sent_is_said_at_the_end(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = attempt(open_root(str(tmp_path)), recipe, 0)
    assert log.tracker is not None

    def away(*_: Any, **__: Any) -> None:
        raise OSError("connection refused")

    gone = Tracker(recipe, "finished")
    monkeypatch.setattr(gone._client, "set_terminated", away)
    gone.close()
    assert "the run does not count as finished: connection refused" in caplog.text
    monkeypatch.setattr(log.tracker._client, "log_batch", away)
    add(log, 1)
    with caplog.at_level(logging.WARNING):
        log.close()
    assert re.search(r"train.mlflow: \d\d values were not sent, see above; metrics.jsonl has them", caplog.text)


def test_names_that_mlflow_does_not_take_are_spelled_otherwise(tmp_path: Path, recipe: Recipe) -> None:
    tracker = Tracker(recipe, RUN)
    tracker.add_scalars(1, [("text/a+b?", 1.0)])
    tracker.close()
    assert run_in(recipe)[1].data.metrics == {"text/a_b_": 1.0}


def test_without_the_package_a_training_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_mlflow(None)
    said = r"train.mlflow is set, but the package mlflow is not installed: pip install 'perceptio\[mlflow\]'"
    with pytest.raises(StageError, match=said):
        require_mlflow("sqlite:///mlruns.db")
    monkeypatch.setattr(train, "inputs", lambda *_: {})
    monkeypatch.setattr(train, "_mixture", pytest.fail)
    with pytest.raises(StageError, match=said):
        train.run(recipe_with("sqlite:///mlruns.db", root=tmp_path))


@pytest.mark.parametrize("address", ["http://me:hunter2@host:5000", "postgresql://me:hunter2@host/runs"])
def test_a_password_in_the_address_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(RecipeError, match="mlflow: the address holds a password, expected none") as refused:
        recipe_with(address)
    assert "hunter2" not in str(refused.value)
    assert recipe_with("http://me@host:5000").train.mlflow == "http://me@host:5000"
