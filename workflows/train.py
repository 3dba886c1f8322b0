"""Co-trains the model on the recipe's weighted mixture.

    perceptio train --recipe rooms

Reads   samples/ of every source in the mixture, codebook/
Writes  runs/RUN/ (checkpoints, metrics.jsonl), model/ (a plain Hugging Face folder), its manifest last
Needs   train.workers workers. A run is named by the digest of all that it depends on, and resumes where it stopped
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import ScalingConfig  # to a type checker ray.train has the one before it

from perceptio.data.mixture import Mixture
from perceptio.data.shards import SampleTable, ShardError
from perceptio.model import PerceptioForConditionalGeneration
from perceptio.train.feed import Feed, Samples, mixture_of
from perceptio.train.flops import model_flops
from perceptio.train.optim import computes_bf16, settled_precision
from perceptio.train.step import train_step
from perceptio.vlm.backbone import merge_lora
from schemas.recipe import Recipe, section_digest
from workflows import runtime
from workflows.bell import bell_on_sigterm
from workflows.checkpoints import Place, Uploads, last_whole, places
from workflows.commits import Table, require_same
from workflows.folders import publish, require, run_storage
from workflows.store import Root, StageError, open_root
from workflows.train_engine import build, engine_of
from workflows.train_log import RECIPE_NAME, TrainLog, read_metrics, timed, watched
from workflows.train_mlflow import Tracker, require_mlflow
from workflows.train_preflight import preflight
from workflows.train_room import require_disk, require_workers
from workflows.train_samples import FixedSamples
from workflows.train_shares import shares_table
from workflows.train_stop import Listener, Stop

# fields of `train` that change how a run is made and not what it makes, but for the rounding of sums: it goes on under
# others
HOW = {"workers", "allowed_workers", "micro_batch", "zero_stage", "offload", "recompute", "threads"}
HOW |= {"cpus_per_worker", "gpus_per_worker", "max_failures", "keep_checkpoints", "checkpoint_every", "peak_flops"}
HOW |= {"samples_every", "samples_shown", "mlflow", "preflight", "preflight_steps", "room_within_s", "resize_every_s"}
HOW |= {"bucket", "cache_dir", "cache_gb"}
HOW |= {"unreadable"}  # a run that was stopped by a damaged table goes on without its rows

log = logging.getLogger(__name__)


def run(recipe: Recipe) -> None:
    """Trains, resumes, or leaves a finished model alone.

    Raises StageError where an input is missing or another's, or there is no room for workers or checkpoints.
    """
    root = open_root(recipe.root)
    made_from = inputs(recipe, root)
    standing = root.manifest("model")
    if standing is not None:
        require_same("model", standing.inputs, made_from)
        log.info("model: complete")
        return
    require_mlflow(recipe.train.mlflow)
    try:
        mixture = _mixture(recipe)
        log.info("mixture: %s", mixture.describe())
    except (ValueError, ShardError) as error:
        raise StageError(f"train: {error}") from error
    name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    require_disk(recipe, root, standing=len(places(root, name)))
    runtime.start(recipe)
    require_workers(recipe)
    train = recipe.train
    if train.precision.startswith("bf16") and not train.gpus_per_worker and not computes_bf16(torch.device("cpu")):
        log.warning(
            "train.precision is %s, which this machine's CPU only emulates, slowly: `auto` or `fp32`, unless the"
            " workers are on other machines",
            train.precision,
        )
    root.write(recipe.model_dump_json(indent=1).encode(), "runs", name, RECIPE_NAME)  # what `explain` reads
    config = {
        "recipe": recipe.model_dump_json(),
        "run": name,
        "inputs": made_from,
        "folder": str(Path.cwd()),
        "code": runtime.code_version(),
    }
    with bell_on_sigterm() as bell:
        _fit(recipe, root, config | {"bell": bell})
        if root.manifest("model") is None and ray.get(bell.heard.remote()):
            step = max(place.step for place in places(root, name))
            raise StageError(f"train: stopped by SIGTERM after step {step} of {train.steps}: run it again to go on")
    require(root, "model", stage="train")
    log.info("train: %s", shares_table(mixture, read_metrics(root, name)))


def _fit(recipe: Recipe, root: Root, config: dict[str, Any]) -> None:
    """Runs the workers to their end; raises StageError where they fail more often than the recipe allows."""
    train, name = recipe.train, config["run"]
    trainer = TorchTrainer(
        _work,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=train.workers,  # (fewest, most) is elastic
            elastic_resize_monitor_interval_s=train.resize_every_s,
            use_gpu=train.gpus_per_worker > 0,
            resources_per_worker={"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker},
        ),
        torch_config=TorchConfig(backend="nccl" if train.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name=name,
            **run_storage(root),
            failure_config=FailureConfig(max_failures=train.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=train.keep_checkpoints, checkpoint_score_attribute="loss", checkpoint_score_order="min"
            ),
        ),
    )
    try:
        with watched(root, name, train.steps):
            trainer.fit()
    except (TrainingFailedError, RayError) as error:
        raise StageError(f"train: run {name} failed: {error}. Checkpoints stay: run it again to resume") from error


def inputs(recipe: Recipe, root: Root) -> dict[str, str]:
    """Digests of all that the model depends on; raises StageError where codes and codebook do not belong together."""
    codebook = require(root, "codebook", stage="codebook")
    found = {
        "codebook": codebook.digest,
        "train": section_digest(recipe.train, exclude=HOW),
        "model": section_digest(recipe.model),
        "seed": str(recipe.seed),
    }
    for entry in recipe.train.mixture:
        table = Table(root, "samples", entry.source)
        manifest = table.require()
        made_with = manifest.inputs.get("codebook", codebook.digest)
        if made_with != codebook.digest:
            raise StageError(
                f"{table}: its codes were made with codebook {made_with[:16]}, codebook/ is {codebook.digest[:16]}:"
                " tokenize and assemble again, or restore that codebook"
            )
        found[f"samples/{entry.source}"] = manifest.digest
    return found


def _work(config: dict[str, Any]) -> None:
    """One worker's whole run: from the recipe to the published model."""
    runtime.enter(config["folder"])
    recipe = Recipe.model_validate_json(config["recipe"])
    train = settled_precision(recipe.train, ray.train.torch.get_device())
    root = open_root(recipe.root)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(train.threads)
    found, attempt = _places(root, config["run"])
    if train.preflight and not found:
        preflight(recipe, root, config["run"], train)
    objective, processor = build(recipe, root)
    counting = rank == 0 and train.peak_flops is not None
    flops = model_flops(objective.model, soft_maps=train.losses.reconstruction > 0) if counting else None
    samples = Samples.open(recipe, processor, world=world)
    feed = Feed(samples, objective.model.segmenter.sam2.config.image_size)
    with last_whole(root, config["run"], found, _all_say) as saved:
        step = 0 if saved is None else samples.mixture.step_of(saved.state)
        engine, schedule = engine_of(objective, train, world, saved, step)
    uploads, listener = Uploads(root, config["run"], attempt), Listener(config.pop("bell"))
    tracker = Tracker(recipe, config["run"]) if rank == 0 and train.mlflow is not None else None
    log_of = partial(TrainLog, mixture=samples.mixture, flops=flops, peak_flops=train.peak_flops, tracker=tracker)
    steps = log_of(root, config["run"], step, workers=world) if rank == 0 else None
    fixed = FixedSamples.of(samples, rank=rank) if train.samples_every else None
    sources = [entry.called for entry in train.mixture]
    losses: list[float] = []  # of the steps since the checkpoint before
    skipped: list[tuple[str, ...]] = []  # the samples of each step of the row that was skipped last
    ahead = feed.ahead(step, train.steps, rank=rank, world=world, micro_batch=train.micro_batch)
    for batches, waited in timed(ahead):
        torch.manual_seed(_mixed(recipe.seed, step, rank))  # dropout: a resumed step draws what it would have drawn
        rate = float(schedule.get_last_lr()[0])
        report = train_step(engine, batches, sources)
        step += 1
        skipped = [*skipped, report.skipped] if report.skipped else []
        losses += [] if report.skipped else [report.loss]
        if steps is not None:
            steps.add(step, report, learning_rate=rate, waited=waited)
        if fixed is not None and step % train.samples_every == 0:
            shown = fixed.draw(engine, objective.model)  # by rank 0, with weights of all
            if steps is not None and shown is not None:
                steps.show(shown)
        stop = listener.ask()
        if step % train.checkpoint_every == 0 or step == train.steps or stop is not Stop.NOT:
            if steps is not None:
                steps.write()  # a run that resumes here has every line up to here
            score = statistics.fmean(losses) if losses else sys.float_info.max
            uploads.save(engine, samples.mixture.state(step * train.global_batch), step, {"loss": score})
            losses = []
        if len(skipped) == min(train.max_skipped_steps, train.steps):
            raise FloatingPointError(
                f"steps {step - len(skipped)} to {step - 1}, counted from 0, were all skipped, gradients not finite;"
                f" samples {skipped}: look at these, or lower the learning rates"
            )
        if stop is Stop.RUN and step < train.steps:
            return
    if steps is not None:
        steps.close()
    made = config | {"precision": train.precision, "seconds": steps.seconds if steps is not None else 0.0}
    _publish(recipe, root, made, engine, objective.model, processor, rank)


def _mixture(recipe: Recipe) -> Mixture:
    """The run's mixture, from its tables."""
    tables = [SampleTable.open(recipe.root, entry.source) for entry in recipe.train.mixture]
    return mixture_of(recipe.train, tables, seed=recipe.seed)


def _places(root: Root, run: str) -> tuple[list[Place], int]:
    """The run's checkpoints and the number of this attempt at it, as rank 0 sees them."""
    own = places(root, run) if ray.train.get_context().get_world_rank() == 0 else []
    found: list[Place] = ray.train.collective.broadcast_from_rank_zero(own)
    return found, max((place.attempt for place in found), default=0) + 1


def _all_say(own: bool) -> bool:
    """Whether all workers say so."""
    said = torch.tensor(int(own), device=ray.train.torch.get_device())
    dist.all_reduce(said, dist.ReduceOp.MIN)
    return bool(said.item())


def _publish(
    recipe: Recipe,
    root: Root,
    config: dict[str, Any],
    engine: Any,
    model: PerceptioForConditionalGeneration,
    processor: Any,
    rank: int,
) -> None:
    """Writes model/ from rank 0: weights gathered, LoRA merged, processor, codebook, digests, manifest last."""
    import deepspeed

    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        if rank != 0 or root.manifest("model") is not None:
            return
        published = recipe.train.publish_dtype
        dtype = None if published == "auto" else getattr(torch, published)
        if recipe.model.language == "lora":
            merge_lora(model, dtype)
        if dtype is not None:
            for weight in model.parameters():  # and no buffer: rotary frequencies and SAM2's places stay in fp32
                weight.data = weight.data.to(dtype)
        with tempfile.TemporaryDirectory(prefix="perceptio-model-") as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            digests = {
                "run": config["run"],
                "codebook_digest": model.config.codebook_digest,
                "inputs": config["inputs"],
            }
            (Path(folder) / "perceptio.json").write_text(json.dumps(digests, indent=1), encoding="utf-8")
            publish(
                root,
                Path(folder),
                "model",
                stage="train",
                attempt=runtime.attempt_id(),
                recipe=recipe.digest,
                code=config["code"],
                inputs=config["inputs"],
                licences=_licences(recipe, root),
                seconds=config["seconds"],
                extra={"precision": config["precision"]},
            )


def _licences(recipe: Recipe, root: Root) -> tuple[Any, ...]:
    return require(root, "codebook", stage="codebook").licences


def _mixed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "little")
