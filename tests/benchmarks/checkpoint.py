"""For how long a checkpoint holds up the training: one worker under Ray Train saves the rooms model with AdamW's state.

A checkpoint holds the training up until it is copied in memory; a synchronous one would until it is whole in the store
(here a local folder). Both are taken of each checkpoint, one after the other, with nothing else to do.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig
from ray.train.torch import TorchTrainer

from workflows import runtime

REPEATS, WARM_UP, BAR = 9, 2, 0.1


def _work(config: dict[str, Any]) -> None:
    import torch

    from perceptio.model import PerceptioForConditionalGeneration
    from perceptio.train.engine import start_engine
    from perceptio.train.optim import deepspeed_config, optimizer_and_schedule
    from perceptio.train.step import Objective
    from perceptio.vlm.backbone import set_trainable
    from schemas.recipe_file import load_recipe
    from tests.benchmarks._stage import RECIPE
    from tests.benchmarks.tokenize import write_codebook
    from workflows.checkpoints import Uploads
    from workflows.store import open_root

    torch.set_num_threads(1)
    recipe = load_recipe(RECIPE)
    train = recipe.train.model_copy(update={"precision": "fp32"})
    folder = Path(config["folder"])
    model, _ = PerceptioForConditionalGeneration.from_parts(
        runtime.shipped("base"), runtime.shipped("segmenter"), write_codebook(folder / "codebook"), max_objects=5
    )
    set_trainable(model, vision=False, projector=True, language="full", embeddings=True)
    objective = Objective(model, train.losses, 1)
    optimizer, schedule = optimizer_and_schedule(objective, train)
    engine = start_engine(objective, optimizer, deepspeed_config(train, 1), schedule)
    uploads = Uploads(open_root(str(folder)), "bench", 1)
    rows = []
    for number in range(REPEATS + WARM_UP):
        began = time.monotonic()
        uploads.save(engine, {"position": number, "digest": ""}, number, {"loss": 0.0})
        blocked = time.monotonic() - began
        assert uploads.before is not None
        uploads.before.result()
        rows.append({"blocked_s": blocked, "stored_s": time.monotonic() - began})
    size = sum(path.stat().st_size for path in (folder / "runs" / "bench" / "step-00000000").rglob("*"))
    (folder / "rows.json").write_text(json.dumps({"rows": rows[WARM_UP:], "megabytes": size / 1e6}))


def run() -> dict[str, Any]:
    """The benchmark's result."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "codebook").mkdir()
        paths = [str(runtime.CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
        try:
            storage = RunConfig(name="bench", storage_path=f"{name}/runs")
            TorchTrainer(_work, train_loop_config={"folder": name}, run_config=storage).fit()
        finally:
            ray.shutdown()
        found = json.loads((Path(name) / "rows.json").read_text())
    blocked, stored = (statistics.median(row[key] for row in found["rows"]) for key in ("blocked_s", "stored_s"))
    return {
        "name": "checkpoint",
        "what": "time that a checkpoint holds the training up, to that until it is in the store",
        "value": blocked / stored,
        "unit": "of a synchronous save",
        "bar": BAR,
        "higher_is_better": False,
        "holds": blocked / stored < BAR,
        **found,
    }
