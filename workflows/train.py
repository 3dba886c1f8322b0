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
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
from perceptio.train.checkpoint import Saved, load_checkpoint, read_weights, set_weights, to_universal
from perceptio.train.feed import Feed, Samples, mixture_of
from perceptio.train.optim import computes_bf16, deepspeed_config, optimizer_and_schedule, settled_precision
from perceptio.train.step import Objective, train_step
from perceptio.vlm.backbone import add_lora, merge_lora, set_trainable
from schemas.recipe import Recipe, TrainRecipe, section_digest
from workflows import runtime
from workflows.bell import bell_on_sigterm
from workflows.checkpoints import Place, Uploads, last_whole, places
from workflows.commits import Table, require_same
from workflows.folders import publish, require, run_storage
from workflows.store import Root, StageError, open_root
from workflows.train_log import RECIPE_NAME, TrainLog, timed, watched
from workflows.train_stop import Listener, Stop
from workflows.untrained import untrained

# fields of `train` that change how a run is made and not what it makes, but for the rounding of sums: it goes on under
# others
HOW = {"workers", "allowed_workers", "micro_batch", "zero_stage", "offload", "recompute", "threads"}
HOW |= {"cpus_per_worker", "gpus_per_worker", "max_failures", "keep_checkpoints", "checkpoint_every"}
HOW |= {"bucket", "cache_dir", "cache_gb"}
HOW |= {"unreadable"}  # a run that was stopped by a damaged table goes on without its rows

log = logging.getLogger(__name__)


def run(recipe: Recipe) -> None:
    """Trains, resumes, or leaves a finished model alone; raises StageError where an input is missing or another's."""
    root = open_root(recipe.root)
    made_from = inputs(recipe, root)
    standing = root.manifest("model")
    if standing is not None:
        require_same("model", standing.inputs, made_from)
        log.info("model: complete")
        return
    try:
        log.info("mixture: %s", _mixture(recipe).describe())
    except (ValueError, ShardError) as error:
        raise StageError(f"train: {error}") from error
    runtime.start(recipe)
    name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
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
    torch.manual_seed(recipe.seed)
    model, processor = _model(recipe, root)
    samples = Samples.open(recipe, processor, world=world)
    feed = Feed(samples, model.segmenter.sam2.config.image_size)
    packed_to = recipe.model.max_length if train.pack else None
    if train.recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    objective = Objective(model, train.losses, len(train.mixture), packed_to=packed_to)
    found, attempt = _places(root, config["run"])
    with last_whole(root, config["run"], found, _all_say) as saved:
        step = 0 if saved is None else samples.mixture.step_of(saved.state)
        engine, schedule = _engine(objective, train, world, saved, step)
    assert model.codec is not None
    model.codec.to(engine.device)
    uploads, listener = Uploads(root, config["run"], attempt), Listener(config.pop("bell"))
    steps = TrainLog(root, config["run"], step, workers=world) if rank == 0 else None
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
    made = config | {"precision": train.precision, "seconds": steps.seconds if steps is not None else 0.0}
    _publish(recipe, root, made, engine, model, processor, rank)


def _model(recipe: Recipe, root: Root) -> tuple[PerceptioForConditionalGeneration, Any]:
    """The untrained model, with the recipe's parts set to train."""
    part = recipe.model
    model, processor = untrained(recipe, root)
    lora = part.lora
    if lora is not None and part.language == "lora":
        add_lora(model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, target_modules=lora.targets)
    set_trainable(
        model,
        vision=part.train_vision,
        projector=part.train_projector,
        language=part.language,
        embeddings=part.train_embeddings,
    )
    model.segmenter.set_trainable(projector=part.train_mask_projector, decoder=part.train_mask_decoder)
    return model, processor


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


def _engine(objective: Objective, train: TrainRecipe, world: int, saved: Saved | None, step: int) -> tuple[Any, Any]:
    """DeepSpeed's engine and the schedule of its rates, as they were when the checkpoint was saved, before `step`."""
    import deepspeed  # in the workers alone: it takes seconds, and prints as it comes

    another_stage = saved is not None and saved.zero_stage != train.zero_stage
    if saved is not None and another_stage:
        log.warning(
            "train.zero_stage is %d, the checkpoint of step %d was saved at stage %d: its weights go on, the optimizer"
            " starts anew",
            train.zero_stage,
            step,
            saved.zero_stage,
        )
        set_weights(objective.model, read_weights(saved))
    optimizer, schedule = optimizer_and_schedule(objective, train, step=step if another_stage else 0)
    universal = saved is not None and not another_stage and saved.world != world
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=deepspeed_config(train, world, universal=universal),
    )
    if saved is not None and universal:
        log.info("the checkpoint of step %d was saved by %d workers, %d go on from it", step, saved.world, world)
        with _universal(saved) as folder:
            load_checkpoint(engine, folder)
    elif saved is not None and not another_stage:
        load_checkpoint(engine, saved.folder)
    return engine, schedule


@contextmanager
def _universal(saved: Saved) -> Iterator[Path]:
    """What `to_universal` writes, once on each machine, in a folder that nobody else may write to."""
    first = ray.train.get_context().get_local_rank() == 0
    with tempfile.TemporaryDirectory(prefix="perceptio-universal-") if first else nullcontext() as own:
        if own is not None:
            to_universal(saved, Path(own))
        machine, known = ray.get_runtime_context().get_node_id(), [("", "")] * dist.get_world_size()
        dist.all_gather_object(known, (machine, own or ""))
        yield next(Path(folder) for where, folder in known if where == machine and folder)
        dist.barrier()  # before it goes


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
