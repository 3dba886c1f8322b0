"""Learns the depth codebook: a VQ-VAE over a stated sample of the teacher's maps.

    perceptio codebook --recipe rooms

Reads   depth/ of every source that is not held out
Writes  codebook/ (config.json, model.safetensors, report.json, reconstructions.png), the manifest last; while it
        trains, runs/codebook-NAME/, which it removes at the end
Needs   codebook.workers workers, data-parallel; each holds its share of the sample in memory at the codebook's size

A run is named by the digest of its settings and of the very rows of its sample, and resumes where it stopped: the
codebook is then the one that an undisturbed run ends with. Depth that is added later leaves a finished codebook valid.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.train import FailureConfig, Result, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from perceptio.depth.codebook import DepthCodebook
from schemas.manifest import Licence, Manifest
from schemas.plan import Plan
from schemas.recipe import Recipe, section_digest
from workflows import codebook_worker, runtime
from workflows.codebook_sample import HELD_OUT_EVERY, Part, sample
from workflows.codebook_worker import REPORT
from workflows.commits import Table, require_same
from workflows.folders import publish_first, run_storage
from workflows.planned import codebook_planned_and_actual, read_plan
from workflows.store import Root, StageError, open_root

log = logging.getLogger(__name__)


def run(recipe: Recipe) -> None:
    """Learns the codebook, resumes, or leaves a finished one alone.

    Raises StageError where an input is missing or another's, or training fails.
    """
    root = open_root(recipe.root)
    tables = {
        source.name: Table(root, "depth", source.name).require() for source in recipe.sources if not source.held_out
    }
    inputs = _inputs(recipe, tables)
    standing = root.manifest("codebook")
    if standing is not None:
        require_same("codebook", standing.inputs, inputs)
        log.info("codebook: complete%s", _grown(standing, tables))
        return
    started, attempt = time.monotonic(), runtime.attempt_id()
    parts = _sample(recipe, tables)
    name = run_name(inputs, parts)
    runtime.start(recipe)
    try:
        result = _trainer(recipe, root, parts, name, attempt, inputs["convention"]).fit()
        standing = root.manifest("codebook") or _publish(
            root,
            read_plan(root, recipe),
            result,
            parts,
            tables,
            attempt=attempt,
            recipe=recipe.digest,
            code=runtime.code_version(),
            inputs=inputs,
            licences=_licences(tables),
            seconds=round(time.monotonic() - started, 3),
        )
    except (TrainingFailedError, RayError, FileNotFoundError) as error:
        standing = root.manifest("codebook")  # an attempt that was first removes the run's folder under ours
        if standing is None:
            raise StageError(
                f"codebook: run {name} failed: {error}. Its states stay: run it again to resume. If it fails in the"
                f" same way, delete {root.at('runs', name)} to begin anew"
            ) from error
    if standing.attempt == attempt:
        _remove(root, name)
    else:
        require_same("codebook", standing.inputs, inputs)
        log.warning("codebook: attempt %s published one first: it stands, ours is dropped", standing.attempt)
    log.info("codebook: held-out MAE %.4f, the mean map's %.4f", standing.extra["mae"], standing.extra["mean_map_mae"])


def run_name(inputs: dict[str, str], parts: list[Part]) -> str:
    """The name of the Ray Train run, "codebook-" and 16 hex digits of all that the codebook depends on."""
    text = json.dumps([inputs, [part.stated() for part in parts]], sort_keys=True)
    return f"codebook-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _sample(recipe: Recipe, tables: dict[str, Manifest]) -> list[Part]:
    """The sample; raises StageError where it is too small to be learnt from and measured on."""
    parts, workers = sample(tables, recipe.codebook.sample_rows, recipe.seed), recipe.codebook.workers
    rows = sum(part.rows for part in parts)
    if rows < HELD_OUT_EVERY * workers:
        limit = "" if rows < recipe.codebook.sample_rows else " (codebook.sample_rows)"
        raise StageError(
            f"codebook: the sample has {rows} maps{limit}, expected at least {HELD_OUT_EVERY} for each of"
            f" {workers} workers: add images, or set codebook.workers lower"
        )
    return parts


def _inputs(recipe: Recipe, tables: dict[str, Manifest]) -> dict[str, str]:
    """What a standing codebook must have been made from. Raises StageError where the maps are not of one kind.

    The rows of its sample are not among it: depth that is added later leaves the codebook as good as it was.
    """
    section = section_digest(recipe.codebook, exclude={"checkpoint_every", "max_failures"})
    inputs = {"settings": f"{section}-{recipe.seed}"}
    for key in ("teacher", "convention"):
        found = {name: manifest.inputs.get(key, "") for name, manifest in tables.items()}
        if len(set(found.values())) != 1:
            raise StageError(f"codebook: the depth tables differ in {key}: {found}; rebuild them with one")
        inputs[key] = next(iter(found.values()))
    return inputs


def _grown(standing: Manifest, tables: dict[str, Manifest]) -> str:
    """What to say of depth tables that are not those which the sample was drawn from."""
    then, now = standing.extra.get("tables"), {name: table.kept for name, table in tables.items()}
    if then is None or then == now:
        return ""
    return (
        f"; its {standing.kept} maps were drawn when the depth tables held {sum(then.values())}, they hold"
        f" {sum(now.values())} now: delete codebook/ to learn it anew"
    )


def _licences(tables: dict[str, Manifest]) -> tuple[Licence, ...]:
    """The licences of all maps, each once."""
    return tuple(dict.fromkeys(licence for manifest in tables.values() for licence in manifest.licences))


def _trainer(recipe: Recipe, root: Root, parts: list[Part], name: str, attempt: str, convention: str) -> TorchTrainer:
    """Ray Train's run of that name, which resumes by itself where its folder stands."""
    return TorchTrainer(
        codebook_worker.work,
        train_loop_config={
            "recipe": recipe.model_dump_json(),
            "parts": [vars(part) for part in parts],
            "attempt": attempt,
            "convention": convention,
            "folder": str(Path.cwd()),
        },
        scaling_config=ScalingConfig(num_workers=recipe.codebook.workers, resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(
            name=name,
            failure_config=FailureConfig(max_failures=recipe.codebook.max_failures),
            **run_storage(root),
        ),
    )


def _publish(
    root: Root, plan: Plan | None, result: Result, parts: list[Part], tables: dict[str, Manifest], **fields: Any
) -> Manifest:
    """The manifest of codebook/: ours, or that of an attempt which was first. It is named by the codebook's own digest,
    so that its report and pictures are no part of what codes and models depend on."""
    assert result.checkpoint is not None and result.metrics is not None  # rank 0 reports one, or fit() has raised
    with result.checkpoint.as_directory() as folder:
        report = json.loads((Path(folder) / REPORT).read_text(encoding="utf-8"))
        digest = DepthCodebook.from_pretrained(folder).digest
        if digest != report["codebook"]:
            raise StageError(
                f"codebook: {result.checkpoint.path} holds codebook {digest[:16]}, its report says"
                f" {report['codebook'][:16]}: it is damaged; delete its run's folder and run again"
            )
        rows = sum(part.rows for part in parts)
        extra = {
            **report,
            "sample": [part.stated() for part in parts],
            "tables": {name: table.kept for name, table in tables.items()},
            "resumed_at": result.metrics["resumed_at"],
            "pace": result.metrics.get("pace"),  # None where an attempt before had learnt it
        }
        if extra["pace"] is not None and not extra["resumed_at"]:
            extra |= codebook_planned_and_actual(plan, fields["seconds"])
        return publish_first(
            root, Path(folder), "codebook", digest=digest, stage="codebook", read=rows, kept=rows, extra=extra, **fields
        )


def _remove(root: Root, name: str) -> None:
    """Deletes the folder of a run whose codebook is published."""
    try:
        root.fs.rm(root.at("runs", name), recursive=True)
    except OSError as error:  # another attempt at the same codebook writes or deletes there too
        log.warning("codebook: %s could not be removed (%s): `clean` does it", root.at("runs", name), error)
