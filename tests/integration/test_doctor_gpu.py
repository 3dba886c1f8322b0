"""The checks of accelerators, on two workers without one: what a CPU can do of them, and what a failure looks like."""

from __future__ import annotations

import pytest
import ray
from conftest import ROOMS

from schemas.recipe_file import load_recipe
from workflows import doctor_gpu
from workflows.doctor import MissingError
from workflows.doctor_gpu import SMALL, Check, found, show


def test_every_check_runs_on_two_workers() -> None:
    checks = {check.name: check for check in found(2, SMALL, gpu=False)}
    products = checks.pop("products")  # a CPU's pace in bf16 is what it is
    assert "TFLOP/s in bf16" in products.seen
    assert {name: check.seen for name, check in checks.items() if not check.passed} == {}
    assert list(checks) == [
        "all-reduce of 1 MB over 2",
        "loss in fp32 beside the CPU's",
        "loss in bf16 beside fp32's",
        "first loss at ZeRO stage 3 in bf16",
        "4 such steps on one batch",
    ]
    assert checks["all-reduce of 1 MB over 2"].seen.startswith("3 to 3, ")


def test_a_failed_check_is_named_beside_what_was_expected(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("one", "1", "1", True), Check("two", "2 within 0.1 of it", "3, 5e-01 off", False)]
    with pytest.raises(MissingError, match="1 of 2 checks failed: two"):
        show(checks)
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "2 within 0.1 of it" in printed and "3, 5e-01 off" in printed


def test_a_machine_without_an_accelerator_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(MissingError, match="Ray sees no GPU, expected at least one"):
        doctor_gpu.run(load_recipe(ROOMS))
