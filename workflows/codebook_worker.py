"""What each worker of the codebook's training does under Ray Train, from its share of the sample to the report.

Shape legend: R rows of this worker, S the codebook's image side.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint
from torch import nn

from perceptio.depth.codebook import CodebookConfig, DepthCodebook
from perceptio.depth.codebook_state import Progress, load_progress, save_progress
from perceptio.depth.codebook_training import (
    PARALLEL,
    STEPS16,
    Measured,
    Plan,
    Share,
    learn,
    mean_map_error,
    measure,
    total_of,
)
from schemas.recipe import Recipe
from workflows import runtime
from workflows.codebook_pictures import Rebuilt, choose, contact_sheet
from workflows.codebook_sample import Part, load_share
from workflows.store import Root, StageError, open_root

REPORT, PICTURE = "report.json", "reconstructions.png"


def work(values: dict[str, Any]) -> None:
    """One worker: its share of the sample, training from the last saved state, the best codebook reported by rank 0."""
    runtime.enter(values["folder"])
    torch.set_num_threads(1)  # another number would round differently
    recipe = Recipe.model_validate_json(values["recipe"])
    root, context = open_root(recipe.root), ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if _gathered(_is_over(root), world)[0]:  # rank 0 decides for all
        return
    section = recipe.codebook
    torch.manual_seed(recipe.seed)
    codebook, model = _models(recipe, world)
    optimizer = torch.optim.Adam(codebook.parameters(), lr=section.learning_rate)
    progress = _resumed(codebook, optimizer)
    parts = [Part(**part) for part in values["parts"]]
    began = time.monotonic()
    share = load_share(root, parts, section.image_size, rank, world)
    loaded, first = time.monotonic(), progress.step
    plan = Plan(
        steps=section.steps,
        batch=section.global_batch // world,
        learning_rate=section.learning_rate,
        seed=recipe.seed,
        checkpoint_every=section.checkpoint_every,
    )

    def save(progress: Progress) -> None:
        with tempfile.TemporaryDirectory(prefix="perceptio-codebook-") as folder:
            if rank == 0:
                save_progress(Path(folder), codebook, optimizer, progress)
            _report(folder, progress, values["attempt"], rank)

    learn(codebook, model, optimizer, share, plan, progress, save)
    learnt = time.monotonic() - loaded
    pace = {"steps": section.steps - first, "learn_seconds": learnt, "load_seconds": loaded - began}
    assert progress.best is not None  # the last step is measured
    codebook.load_state_dict(progress.best)
    with tempfile.TemporaryDirectory(prefix="perceptio-codebook-") as folder:
        report = _finish(codebook.cpu().eval(), share, progress, Path(folder), rank, world)
        if rank == 0:
            report |= {"convention": values["convention"], "history": progress.history}
            (Path(folder) / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        _report(folder, progress, values["attempt"], rank, pace=pace)


def _models(recipe: Recipe, world: int) -> tuple[DepthCodebook, nn.Module]:
    """The untrained codebook, and the same as Ray Train wraps it."""
    section = recipe.codebook
    names = {"image_size", "codes", "dim", "channels", "residual_blocks", "ema_decay", "commitment", "gradient_weight"}
    codebook = DepthCodebook(CodebookConfig(**section.model_dump(include=names)), synchronised=world > 1)
    codebook.to(ray.train.torch.get_device())
    return codebook, ray.train.torch.prepare_model(codebook, parallel_strategy_kwargs=PARALLEL)


def _is_over(root: Root) -> bool:
    """Whether nothing is left to train: another attempt published the codebook, or this run's driver died before."""
    if root.manifest("codebook") is not None:
        return True
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return False
    with checkpoint.as_directory() as folder:
        return (Path(folder) / REPORT).is_file()


def _resumed(codebook: DepthCodebook, optimizer: torch.optim.Optimizer) -> Progress:
    """The progress of the run's last saved state, which codebook and optimizer are set to; none at first."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Progress()
    with checkpoint.as_directory() as folder:
        return load_progress(Path(folder), codebook, optimizer)


def _report(folder: str, progress: Progress, attempt: str, rank: int, **more: Any) -> None:
    """Hands a folder to Ray Train's storage, from rank 0; every rank calls it equally often.

    Attempts that overlap never write to one folder, so whatever a run's list names is whole.
    """
    ray.train.report(
        {"step": progress.step, "resumed_at": progress.resumed_at, **progress.figures, **more},
        checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None,
        checkpoint_dir_name=f"step-{progress.step:08d}-{attempt}",
    )


def _finish(
    codebook: DepthCodebook, share: Share, progress: Progress, folder: Path, rank: int, world: int
) -> dict[str, Any]:
    """The report over all ranks' held-out maps, after rank 0 wrote codebook and pictures into `folder`."""
    digests = _gathered(codebook.digest, world)
    if len(set(digests)) != 1:
        raise StageError(f"codebook: the workers end with different codebooks {digests}: statistics were not shared")
    found = measure(codebook, share.held_out_RSS)
    errors = list(zip(found.errors_R.tolist(), share.names, strict=True))
    groups = choose([pair for pairs in _gathered(errors, world) for pair in pairs])
    wanted = {name for names in groups.values() for name in names}
    rebuilt = {row.name: row for rows in _gathered(_rebuilt(codebook, share, found, wanted), world) for row in rows}
    if rank == 0:
        codebook.save_pretrained(folder)
        sheet = contact_sheet({group: [rebuilt[name] for name in names] for group, names in groups.items()})
        sheet.save(folder / PICTURE)
    return {
        **progress.figures,
        "mean_map_mae": mean_map_error(share),
        "rows": int(total_of(torch.tensor(len(share.train_RSS) + len(share.held_out_RSS)))),
        "held_out_rows": int(total_of(torch.tensor(len(share.held_out_RSS)))),
        "workers": world,
        "codebook": codebook.digest,
        "code_counts": found.counts_K.int().tolist(),
        "shown": {
            group: [{"map": name, "mae": rebuilt[name].mae} for name in names] for group, names in groups.items()
        },
    }


@torch.no_grad()
def _rebuilt(codebook: DepthCodebook, share: Share, found: Measured, wanted: set[str]) -> list[Rebuilt]:
    """This worker's maps of those names, with what the codebook makes of them."""
    rows = [row for row, name in enumerate(share.names) if name in wanted]
    truth_RSS = share.held_out_RSS[rows].float() / STEPS16
    found_RSS = codebook(truth_RSS).inv_depth_BSS.clamp(0, 1) if rows else truth_RSS
    return [
        Rebuilt(share.names[row], float(found.errors_R[row]), truth_SS.numpy(), found_SS.numpy())
        for row, truth_SS, found_SS in zip(rows, truth_RSS, found_RSS, strict=True)
    ]


def _gathered(value: Any, world: int) -> list[Any]:
    """Every worker's value, in the order of ranks."""
    values: list[Any] = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values
