"""Learns the depth codebook: a VQ-VAE over a stated sample of the teacher's maps.

    perceptio codebook --recipe rooms

Reads   depth/ of every source that is not held out
Writes  codebook/ (config.json, model.safetensors, report.json), the manifest last
Needs   codebook.workers workers, data-parallel; each holds its share of the sample in memory at the codebook's size

Shape legend: R rows of this worker, B its part of a batch, S the codebook's image side, K codes.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train import Checkpoint, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from torch import Tensor
from torch.nn import functional as F

from perceptio.data.images import decode_depth16
from perceptio.depth.codebook import CodebookConfig, DepthCodebook
from schemas.manifest import Licence, Manifest
from schemas.recipe import Recipe, section_digest
from workflows import runtime
from workflows.commits import Table, require_same
from workflows.folders import publish
from workflows.store import Root, StageError, open_root

HELD_OUT_EVERY = 10  # one row of the sample in ten is measured on and never trained on
WARM_UP = 0.2  # share of the steps without quantizing: k-means on an untrained encoder's features finds nothing
MEASURES = 6  # times that the held-out error is taken; the best weights are kept
STEPS16 = 65535

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A shard of the sample: where it is, and its first row's number in the sample."""

    source: str
    shard: int
    first: int
    rows: int


def run(recipe: Recipe) -> None:
    """Learns the codebook, or leaves a finished one alone; raises StageError where an input is missing or another's."""
    root = open_root(recipe.root)
    tables = {
        source.name: Table(root, "depth", source.name).require() for source in recipe.sources if not source.held_out
    }
    inputs = _inputs(recipe, tables)
    standing = root.manifest("codebook")
    if standing is not None:
        require_same("codebook", standing.inputs, inputs)
        log.info("codebook: complete")
        return
    started, attempt = time.monotonic(), runtime.attempt_id()
    parts = sample(tables, recipe.codebook.sample_rows, recipe.seed)
    rows = sum(part.rows for part in parts)
    if rows < HELD_OUT_EVERY * recipe.codebook.workers:
        raise StageError(
            f"codebook: the depth tables hold {rows} maps, expected at least {HELD_OUT_EVERY} for each of "
            f"{recipe.codebook.workers} workers: add images, or set codebook.workers lower"
        )
    runtime.start(recipe)
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "recipe": recipe.model_dump_json(),
            "parts": [vars(part) for part in parts],
            "convention": inputs["convention"],
        },
        scaling_config=ScalingConfig(num_workers=recipe.codebook.workers, resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(
            name=f"codebook-{attempt}",  # of its own: Ray Train would silently resume a run whose name it knows
            storage_path=root.at("runs") if "file" in root.fs.protocol else f"{root.uri}/runs",
        ),
    )
    try:
        result = trainer.fit()
    except (TrainingFailedError, RayError) as error:
        raise StageError(f"codebook: training failed: {error}") from error
    assert result.checkpoint is not None  # rank 0 reports one, or fit() has raised
    with result.checkpoint.as_directory() as folder:
        report = json.loads((Path(folder) / "report.json").read_text())
        publish(
            root,
            Path(folder),
            "codebook",
            stage="codebook",
            attempt=attempt,
            recipe=recipe.digest,
            code=runtime.code_version(),
            inputs=inputs,
            licences=_licences(tables),
            read=rows,
            kept=rows,
            seconds=round(time.monotonic() - started, 3),
            extra=report,
        )
    log.info("codebook: held-out MAE %.4f, the mean map's %.4f", report["mae"], report["mean_map_mae"])


def sample(tables: dict[str, Manifest], rows: int, seed: int) -> list[Part]:
    """The first `rows` rows of all sources' shards in an order drawn from `seed`; all there are if they are fewer.

    Whole shards but the last: a sample of rows from everywhere would read every shard of a large table.
    """
    shards = [(name, commit) for name in sorted(tables) for commit in tables[name].shards if commit.kept]
    parts: list[Part] = []
    taken = 0
    for place in np.random.default_rng(seed).permutation(len(shards)):
        if taken == rows:
            break
        name, commit = shards[place]
        parts.append(Part(name, commit.shard, taken, min(commit.kept, rows - taken)))
        taken += parts[-1].rows
    return parts


def _inputs(recipe: Recipe, tables: dict[str, Manifest]) -> dict[str, str]:
    """Everything that the codebook depends on. Raises StageError where the maps are not of one kind."""
    inputs = {"settings": f"{section_digest(recipe.codebook)}-{recipe.seed}"}
    for key in ("teacher", "convention"):
        found = {name: manifest.inputs.get(key, "") for name, manifest in tables.items()}
        if len(set(found.values())) != 1:
            raise StageError(f"codebook: the depth tables differ in {key}: {found}; rebuild them with one")
        inputs[key] = next(iter(found.values()))
    return inputs | {f"depth/{name}": manifest.digest for name, manifest in tables.items()}


def _licences(tables: dict[str, Manifest]) -> tuple[Licence, ...]:
    """The licences of all maps, each once."""
    return tuple(dict.fromkeys(licence for manifest in tables.values() for licence in manifest.licences))


def _work(values: dict[str, Any]) -> None:
    """One worker: its share of the sample, data-parallel training, the best weights reported by rank 0."""
    recipe = Recipe.model_validate_json(values["recipe"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(recipe.seed)
    section = recipe.codebook
    config = CodebookConfig(
        **section.model_dump(
            include={"image_size", "codes", "dim", "channels", "residual_blocks", "ema_decay", "commitment"}
        ),
        gradient_weight=section.gradient_weight,
    )
    codebook = DepthCodebook(config, synchronised=world > 1)
    root = open_root(recipe.root)
    maps_RSS, held_out = load_share(root, [Part(**part) for part in values["parts"]], config.image_size, rank, world)
    train_RSS, held_out_RSS = maps_RSS[~held_out], maps_RSS[held_out]
    torch.manual_seed(recipe.seed * world + rank)
    codebook, best, history = _train(codebook, train_RSS, held_out_RSS, recipe)
    digests: list[str] = [""] * world
    if world > 1:
        dist.all_gather_object(digests, codebook.digest)
        if len(set(digests)) != 1:
            raise StageError(
                f"codebook: the workers end with different codebooks {digests}: statistics were not shared"
            )
    report = {
        **best,
        "mean_map_mae": _mean_map_error(train_RSS, held_out_RSS),
        "rows": int(_total(torch.tensor(float(len(maps_RSS))))),
        "held_out_rows": int(_total(torch.tensor(float(len(held_out_RSS))))),
        "workers": world,
        "convention": values["convention"],
        "codebook": codebook.digest,
        "history": history,
    }
    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            codebook.save_pretrained(folder)
            (Path(folder) / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        ray.train.report({"mae": best["mae"]}, checkpoint=Checkpoint(folder) if rank == 0 else None)


def load_share(root: Root, parts: list[Part], size: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """(maps_RSS uint16, held_out_R bool): this worker's share of the sample, maps at the codebook's size."""
    maps, held_out = [], []
    for part in parts:
        column = Table(root, "depth", part.source).read_shard(part.shard, columns=["inv_depth"])["inv_depth"]
        for row in range(part.rows):
            turn, place = divmod(part.first + row, HELD_OUT_EVERY)
            is_held_out = place == HELD_OUT_EVERY - 1
            number = turn if is_held_out else turn * (HELD_OUT_EVERY - 1) + place  # within its own kind
            if number % world != rank:
                continue
            map_HW = torch.from_numpy(decode_depth16(column[row].as_py()).astype(np.float32))
            map_SS = F.interpolate(map_HW[None, None], (size, size), mode="bilinear", antialias=True)[0, 0]
            maps.append(map_SS.round().clamp(0, STEPS16).to(torch.uint16))
            held_out.append(is_held_out)
    return torch.stack(maps), torch.tensor(held_out)


def _train(
    codebook: DepthCodebook, train_RSS: Tensor, held_out_RSS: Tensor, recipe: Recipe
) -> tuple[DepthCodebook, dict[str, float], list[dict[str, float]]]:
    """The best codebook by held-out error, its figures, and the figures at each measure."""
    section = recipe.codebook
    device = ray.train.torch.get_device()
    # no broadcast of buffers: the quantizer shares its statistics itself, and a difference must show
    codebook.to(device)
    model = ray.train.torch.prepare_model(codebook, parallel_strategy_kwargs={"broadcast_buffers": False})
    optimizer = torch.optim.Adam(model.parameters(), lr=section.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / section.steps))
    )
    batches = _batches(train_RSS, section.global_batch // ray.train.get_context().get_world_size())
    warm_up = int(WARM_UP * section.steps)
    measured = {section.steps - 1 - i * (section.steps - warm_up) // MEASURES for i in range(MEASURES)}
    history: list[dict[str, float]] = []
    best, best_figures = codebook, {"mae": math.inf}
    for step in range(section.steps):
        losses = model(next(batches).to(device), quantize=step >= warm_up).losses
        optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        optimizer.step()
        schedule.step()
        if step in measured:
            figures = measure(codebook, held_out_RSS)
            history.append({"step": step + 1, **figures, **{name: float(v.detach()) for name, v in losses.items()}})
            if figures["mae"] < best_figures["mae"]:
                best, best_figures = deepcopy(codebook), figures
            model.train()
    return best.cpu().eval(), best_figures, history


def _batches(maps_RSS: Tensor, batch: int) -> Iterator[Tensor]:
    """Batches in [0, 1] for ever: every row once a pass, in a new order each."""
    rows: list[int] = []
    while True:
        while len(rows) < batch:
            rows += torch.randperm(len(maps_RSS)).tolist()
        chosen, rows = rows[:batch], rows[batch:]
        yield maps_RSS[chosen].float() / STEPS16


@torch.no_grad()
def measure(codebook: DepthCodebook, maps_RSS: Tensor) -> dict[str, float]:
    """Figures over all workers' held-out maps: mae (inv_depth), usage (share of the codes), perplexity."""
    codebook.eval()
    error, counts_K = torch.zeros(()), torch.zeros(codebook.config.codes)
    for maps_BSS in torch.split(maps_RSS, 64):
        truth_BSS = maps_BSS.float().to(codebook.vectors_KD.device) / STEPS16
        found = codebook(truth_BSS)
        error += (found.inv_depth_BSS.clamp(0, 1) - truth_BSS).abs().mean(dim=(1, 2)).sum().cpu()
        counts_K += torch.bincount(found.codes_BN.flatten(), minlength=codebook.config.codes).cpu()
    counts_K, rows = _total(counts_K), _total(torch.tensor(float(len(maps_RSS))))
    share_K = counts_K / counts_K.sum()
    return {
        "mae": float(_total(error) / rows),
        "usage": float((counts_K > 0).float().mean()),
        "perplexity": float(torch.special.entr(share_K).sum().exp()),
    }


def _mean_map_error(train_RSS: Tensor, held_out_RSS: Tensor) -> float:
    """Held-out MAE of the mean training map: what can be had without looking."""
    rows = _total(torch.tensor(float(len(train_RSS))))
    mean_SS = _total(train_RSS.double().sum(dim=0)) / rows / STEPS16
    error = (held_out_RSS.double() / STEPS16 - mean_SS).abs().mean(dim=(1, 2)).sum()
    return float(_total(error) / _total(torch.tensor(float(len(held_out_RSS)))))


def _total(value: Tensor) -> Tensor:
    """The sum of a tensor over all workers."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value
