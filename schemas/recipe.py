"""The recipe: everything that a run depends on, as frozen pydantic models read from one YAML file.

`schemas.recipe_file` reads it; its sources are in `schemas.sources`, model and training in `schemas.training`. What
changes results (seed, grid, codes, weights) has no default here.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from schemas.mixture import MixtureEntry as MixtureEntry
from schemas.section import Positive as Positive
from schemas.section import Section as Section
from schemas.section import Share, Weight
from schemas.sources import FileSource as FileSource
from schemas.sources import FolderSource as FolderSource
from schemas.sources import RoomsSource as RoomsSource
from schemas.sources import Source as Source
from schemas.study import StudyArm as StudyArm
from schemas.study import StudyRecipe as StudyRecipe
from schemas.training import ModelRecipe as ModelRecipe
from schemas.training import TrainRecipe as TrainRecipe


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the field, the value seen and what to do."""


class PoolRecipe(Section):
    """An actor pool of Ray Data."""

    min_actors: Positive
    max_actors: Positive
    cpus: Annotated[float, Field(gt=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = Field(default=0.0, description="of one actor; 0.25 = four share one")
    threads: Positive = Field(default=1, description="torch threads of one actor; part of what fixes digests")

    @model_validator(mode="after")
    def _ordered(self) -> PoolRecipe:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors {self.min_actors} is above max_actors {self.max_actors}: swap them")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus {self.gpus:g} is neither a share of one nor whole: Ray gives 0.25 or 2, not 1.5")
        return self


class IngestRecipe(Section):
    rows_per_shard: Positive
    min_side: Positive = Field(description="pixels; smaller images are rejected")
    max_pixels: Positive = Field(description="larger images are rejected before they are decoded")
    max_side: Positive = Field(description="pixels; larger images are scaled down to it, keeping the aspect ratio")
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    contamination: Literal["reject", "report"] = Field(
        default="reject", description="what becomes of a training image that a held-out source has too"
    )
    pool: PoolRecipe


class DepthRecipe(Section):
    teacher: str = Field(description="`rooms`, a folder, a hub id, or `recorded` (the data set's own depth)")
    batch_size: Positive = Field(description="images of one shape in a batch; changes the last digits of maps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        description="of the teacher's weights; auto: float16 where the pool has accelerators, else float32"
    )
    maps: Literal["all", "sample"] = Field(
        default="all",
        description="full maps that are kept: all, or those of held-out sources and of the codebook's sample;"
        " `tokenize` then makes the codes of all that is not held out straight from the images",
    )
    pool: PoolRecipe

    @property
    def precision(self) -> Literal["float32", "bfloat16", "float16"]:
        """The type that `dtype` means. float16, not bfloat16: an error of 1e-4 in inv_depth, not 1e-3 (rooms)."""
        if self.dtype != "auto":
            return self.dtype
        return "float16" if self.pool.gpus else "float32"


class MasksRecipe(Section):
    teacher: str = Field(description="`rooms` or a folder of a SAM2 image model")
    min_predicted_iou: Share
    min_stability: Share
    pool: PoolRecipe


class CodebookRecipe(Section):
    image_size: Positive
    stride: Positive
    codes: Annotated[int, Field(ge=2)]
    dim: Positive
    channels: tuple[Positive, ...] = Field(description="of the stride-2 convolutions, first to last")
    residual_blocks: Annotated[int, Field(ge=0)]
    ema_decay: Annotated[float, Field(gt=0, lt=1)]
    commitment: Weight
    gradient_weight: Weight
    steps: Positive
    global_batch: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    sample_rows: Positive = Field(description="depth maps that it is trained from")
    workers: Positive
    checkpoint_every: Positive = Field(description="steps between saved states; changes no result")
    max_failures: Annotated[int, Field(ge=0)] = Field(default=3, description="deaths of workers that a run survives")

    @property
    def tokens(self) -> int:
        """Number of depth tokens per image, N."""
        return (self.image_size // self.stride) ** 2

    @model_validator(mode="after")
    def _grid(self) -> CodebookRecipe:
        if self.image_size % self.stride:
            raise ValueError(f"image_size {self.image_size} is not a multiple of stride {self.stride}")
        if 2 ** len(self.channels) != self.stride:
            raise ValueError(f"stride {self.stride} needs log2(stride) channels, got {len(self.channels)}")
        if self.global_batch % self.workers:
            raise ValueError(f"global_batch {self.global_batch} does not divide by workers {self.workers}")
        return self


class TokenizeRecipe(Section):
    batch_size: Positive
    pool: PoolRecipe


class AssembleRecipe(Section):
    row_group_rows: Positive
    pool: PoolRecipe


class EvaluateRecipe(Section):
    batch_size: Positive
    limit: Positive = Field(description="scenes per held-out source")
    free: Annotated[int, Field(ge=0)] = Field(default=96, description="of them asked without the grammar too")
    blank: Annotated[int, Field(ge=0)] = Field(default=120, description="of them asked with the image removed too")
    untrained: bool = Field(default=True, description="ask the untrained start too")
    codes: Literal["own", "oracle", "shuffled", "other"] = Field(
        default="own",
        description="whose depth codes stand in a reply: the model's own; or, for the study of what answers take from"
        " them, forced on it: those of the picture's teacher, the same in random order, or another picture's",
    )
    max_new_tokens: Positive
    bootstrap: Positive = Field(description="resamples for 95 % intervals")
    pool: PoolRecipe


class ServeRecipe(Section):
    fallback: Literal["none", "rooms"] = Field(
        default="none", description="served where root has no model: nothing, or the small one that is shipped"
    )
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)]
    min_replicas: Annotated[int, Field(ge=0)]
    max_replicas: Positive
    target_ongoing_requests: Positive
    max_ongoing_requests: Positive
    max_queued_requests: Positive
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 120.0
    cpus: Annotated[float, Field(gt=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    threads: Positive = 1
    max_batch: Positive
    batch_wait_s: Annotated[float, Field(ge=0)]
    max_image_bytes: Positive
    max_image_pixels: Positive
    max_question_chars: Positive
    max_new_tokens: Positive

    @model_validator(mode="after")
    def _replicas(self) -> ServeRecipe:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class ClusterRecipe(Section):
    """What a local Ray is started with; on a cluster the job joins the one that runs."""

    logical_cpus: Positive = Field(description="of a Ray started here; may exceed the cores")
    min_memory_gb: Annotated[float, Field(gt=0)]
    object_store_mb: Positive


class MachineRecipe(Section):
    """A kind of machine that stages may run on."""

    cpus: Positive
    gpus: Annotated[int, Field(ge=0)] = 0
    memory_gb: Annotated[float, Field(gt=0)]
    count: Positive = Field(description="machines that can be had at once")
    usd_per_hour: Weight | None = Field(default=None, description="of one machine; without it no money is stated")


class PriceRecipe(Section):
    """What a store asks; no defaults, since prices differ by place and year."""

    storage_usd_per_gb_month: Weight = Field(description="of 10^9 bytes")
    put_usd_per_1000: Weight = Field(description="PUT, POST, LIST")
    get_usd_per_1000: Weight = Field(description="GET, HEAD")


class PlanRecipe(Section):
    """What `plan` measures with and reckons for; it changes no result."""

    sample_rows: Positive = Field(default=64, description="of each source; some batches of the largest batch size")
    machines: dict[str, MachineRecipe] = Field(
        default={}, description="by kind; {} for the machine that `plan` runs on"
    )
    prices: PriceRecipe | None = None


class Recipe(Section):
    name: str
    root: str = Field(description="folder or URI that every table of the run lies under")
    seed: int
    accept_non_commercial: bool = False
    max_reject_share: Share
    sources: tuple[Source, ...]
    cluster: ClusterRecipe
    ingest: IngestRecipe
    depth: DepthRecipe
    masks: MasksRecipe
    codebook: CodebookRecipe
    tokenize: TokenizeRecipe
    assemble: AssembleRecipe
    model: ModelRecipe
    train: TrainRecipe
    evaluate: EvaluateRecipe
    serve: ServeRecipe
    study: StudyRecipe | None = None
    plan: PlanRecipe = PlanRecipe()

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        names = [source.name for source in self.sources]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"sources are named twice: {doubled}; names must be unique")
        for i, entry in enumerate(self.train.mixture):
            if entry.source not in names:
                raise ValueError(f"train.mixture.{i}.source '{entry.source}' is no source; known: {names}")
            if self.source(entry.source).held_out:
                raise ValueError(f"train.mixture.{i}.source '{entry.source}' is held out: never train on it")
        return self

    def source(self, name: str) -> RoomsSource | FileSource:
        """The source of that name."""
        return next(source for source in self.sources if source.name == name)

    @property
    def digest(self) -> str:
        """16 hex digits over every field but `root` and `plan`: a moved run keeps its name, whatever it costs there."""
        return section_digest(self, exclude={"root", "plan"})


def section_digest(section: BaseModel, *, exclude: set[str] | None = None) -> str:
    """16 hex digits of a section's canonical JSON, less what is at its default.

    So a release that adds a field renames nothing that stands. In return a default, once released, never changes: its
    tables would pass for those of the new one (a test keeps them).
    """
    text = json.dumps(section.model_dump(mode="json", exclude=exclude, exclude_defaults=True), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
