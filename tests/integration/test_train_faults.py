"""Trainings that are killed, torn, and gone on with by other workers: the same samples, and on as many workers the
same losses to the last bit."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faults import start_driver
from s3_server import BUCKET, Faults, FaultyProxy, s3_server
from trainings import STEPS, TRAIN_DRIVER, killed_at, lines_of, prepared, run_of, series, wait_for_step

from schemas.recipe import Recipe
from tests.tiny import tiny_parts
from workflows import train
from workflows.checkpoints import places
from workflows.store import StageError, open_root


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny_parts(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Recipe:
    recipe = prepared(tmp_path_factory.mktemp("undisturbed"), parts)
    train.run(recipe)
    assert [step for step, *_ in series(recipe)] == list(range(1, STEPS + 1))
    assert len({drawn for _, drawn, _ in series(recipe)}) > 1
    return recipe


def interrupted(folder: Path, parts: Path, moment: int, **settings: object) -> Recipe:
    """A run that died after some steps and was not taken up again."""
    recipe = prepared(folder, parts, train__max_failures=0, **settings)
    with killed_at(recipe, moment), pytest.raises(StageError, match="Checkpoints stay: run it again to resume"):
        train.run(recipe)
    return recipe


def test_three_killed_workers_change_nothing(tmp_path: Path, undisturbed: Recipe, parts: Path) -> None:
    recipe = prepared(tmp_path, parts, train__max_failures=3)
    moments = sorted(random.Random(5).sample(range(1, STEPS - 4), 3))  # the log tells of later ones too late
    with killed_at(recipe, *moments) as hit:
        train.run(recipe)
    assert series(recipe) == series(undisturbed), f"killed after steps {hit}"


def test_after_a_killed_driver_the_run_goes_on(
    tmp_path: Path, undisturbed: Recipe, parts: Path, local_ray: str
) -> None:
    recipe = prepared(tmp_path, parts)
    driver = start_driver(recipe, local_ray, script=TRAIN_DRIVER)
    wait_for_step(recipe, 5)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert open_root(recipe.root).manifest("model") is None
    train.run(recipe)
    assert series(recipe) == series(undisturbed)


def test_spoilt_checkpoints_are_passed_over(tmp_path: Path, undisturbed: Recipe, parts: Path) -> None:
    recipe = interrupted(tmp_path, parts, 8, train__checkpoint_every=2, train__keep_checkpoints=9)
    run, root = run_of(recipe), open_root(recipe.root)
    assert run is not None
    *_, damaged, torn = (Path(root.at("runs", run, place.name)) for place in places(root, run))
    next(torn.glob("state/*optim_states.pt")).unlink()
    file = damaged / "state" / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    train.run(recipe)
    assert series(recipe) == series(undisturbed)
    second = {place.name for place in places(root, run) if place.attempt == 2}
    assert {f"{damaged.name}-2", f"{torn.name}-2"} <= second, "both were passed over, and taken anew"


def test_another_number_of_workers_goes_on(tmp_path: Path, undisturbed: Recipe, parts: Path) -> None:
    recipe = interrupted(tmp_path, parts, 5)
    run = run_of(recipe)
    train.run(recipe.model_copy(update={"train": recipe.train.model_copy(update={"workers": 1})}))
    assert run_of(recipe) == run, "the number of workers is no other run"
    assert [line["workers"] for line in lines_of(recipe)][-1] == 1
    found, expected = series(recipe), series(undisturbed)
    assert [line[:2] for line in found] == [line[:2] for line in expected]
    np.testing.assert_allclose([loss for *_, loss in found], [loss for *_, loss in expected], rtol=2e-3)


def test_another_stage_goes_on_from_the_weights_and_says_so(
    tmp_path: Path, undisturbed: Recipe, parts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = interrupted(tmp_path, parts, 5, train__zero_stage=2)
    train.run(recipe.model_copy(update={"train": recipe.train.model_copy(update={"zero_stage": 3})}))
    rates = [[line["learning_rate"] for line in lines_of(of)] for of in (recipe, undisturbed)]
    np.testing.assert_allclose(*rates, rtol=1e-9)
    assert [drawn for _, drawn, _ in series(recipe)] == [drawn for _, drawn, _ in series(undisturbed)]
    first, second = ([loss for *_, loss in series(of)] for of in (recipe, undisturbed))
    np.testing.assert_allclose(first, second, rtol=0.05)
    assert first != second


def test_a_driver_told_to_end_leaves_a_last_checkpoint(
    tmp_path: Path, undisturbed: Recipe, parts: Path, local_ray: str
) -> None:
    recipe = prepared(tmp_path, parts, train__checkpoint_every=STEPS)
    driver = start_driver(recipe, local_ray, script=TRAIN_DRIVER)
    wait_for_step(recipe, 4)
    driver.send_signal(signal.SIGTERM)
    output, _ = driver.communicate(timeout=120)
    run, root = run_of(recipe), open_root(recipe.root)
    assert run is not None
    (place,) = places(root, run)
    assert 4 <= place.step < STEPS
    assert driver.returncode == 1
    assert f"stopped by SIGTERM after step {place.step} of {STEPS}: run it again to go on" in output
    began = len(lines_of(recipe))
    assert began >= place.step
    train.run(recipe)
    assert series(recipe) == series(undisturbed)
    assert {found.attempt for found in places(root, run)} >= {2}, "it went on, and did not begin again"


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_ten_killed_workers_change_nothing(tmp_path: Path, parts: Path, record: Callable[..., None]) -> None:
    sizes = {"train__steps": 60, "train__checkpoint_every": 4}
    steady = prepared(tmp_path / "steady", parts, **sizes)
    train.run(steady)
    recipe = prepared(tmp_path / "killed", parts, **sizes, train__max_failures=10)
    moments = sorted(random.Random(6).sample(range(1, 58), 10))
    with killed_at(recipe, *moments) as hit:
        train.run(recipe)
    record(steps=60, killed_after=hit, first=series(recipe)[0], last=series(recipe)[-1])
    assert series(recipe) == series(steady), f"killed after steps {hit}"


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_a_store_away_for_a_minute_changes_nothing(
    tmp_path: Path, parts: Path, record: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ray of its own, whose processes know the store's address from its start."""
    sizes = {"train__steps": 60, "train__checkpoint_every": 4}
    steady = prepared(tmp_path / "steady", parts, **sizes)
    train.run(steady)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with s3_server() as port, FaultyProxy(port, Faults()) as proxy:
        for name, value in {"AWS_ENDPOINT_URL": proxy.url, "AWS_ACCESS_KEY_ID": "test"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        recipe = prepared(f"s3://{BUCKET}/root", parts, **sizes, train__max_failures=3)
        driver = start_driver(recipe, "", script=TRAIN_DRIVER)
        away_after = wait_for_step(recipe, 10)
        proxy.faults = Faults(rate=1.0, kinds=("reset",), most_in_a_row=10**9)
        time.sleep(60)
        proxy.faults = Faults()
        output, _ = driver.communicate(timeout=900)
        assert driver.returncode == 0, output
        record(steps=60, away_after=away_after, requests_refused=proxy.injected["reset"])
        assert proxy.injected["reset"] > 0, "the store was not missed"
        assert series(recipe) == series(steady)
