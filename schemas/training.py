"""What training depends on: the model and its trainable parts, the mixture, the weights of the loss terms."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from schemas.deepspeed_section import require_passable
from schemas.mixture import MixtureEntry, WeightChange
from schemas.section import Positive, Section, Share, Weight

SpatialName = Literal["seg", "depth_start", "code", "depth_end"]


class LoraRecipe(Section):
    rank: Positive
    alpha: Positive
    dropout: Share
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class ModelRecipe(Section):
    base: str = Field(description="`rooms`, a folder or a hub id of an InternVL model")
    sam2: str = Field(description="`rooms` or a folder of a SAM2 image model")
    language: Literal["lora", "full", "frozen"]
    lora: LoraRecipe | None = None
    train_vision: bool = Field(description="InternViT")
    train_projector: bool = Field(description="between InternViT and the language model")
    train_embeddings: bool = Field(description="input embeddings and output head, where the spatial tokens are new")
    train_mask_projector: bool = Field(description="from [SEG] states to SAM2's prompts; it starts at random")
    train_mask_decoder: bool = Field(description="SAM2's, with its two high-res convolutions; its encoder never trains")
    starts_as: dict[SpatialName, str] = Field(
        description="tokens of the base whose embeddings spatial tokens start as, else the mean of all (reconstruction)"
    )
    embedding_noise: Weight = Field(
        default=0.1,
        description="around the mean of the base's embeddings, where spatial tokens start, in their standard deviations"
        " (reconstruction)",
    )
    prompts_start_as_clicks: bool = Field(
        description="the mask projector starts in SAM2's space of clicks (reconstruction), else as torch starts it"
    )
    max_objects: Positive = 5
    depth_after_text: bool = Field(
        default=False, description="the depth block stands behind the text, for the study of the order"
    )
    max_length: Positive

    @model_validator(mode="after")
    def _lora(self) -> ModelRecipe:
        if self.language == "lora" and self.lora is None:
            raise ValueError("language is 'lora' but there is no `lora` section: add one")
        return self


class LossWeights(Section):
    """Weights of the named terms (METHOD.md, reconstruction); no defaults, since they change results."""

    text: Weight
    marker: Weight
    token: Weight
    count: Weight
    reconstruction: Weight
    mask_bce: Weight
    mask_dice: Weight
    temperature: Annotated[float, Field(gt=0)] = Field(description="tau of soft merging")
    gradient: Weight = Field(description="of the gradient-matching part inside reconstruction")
    mask_points: Positive = Field(description="sampled points per mask")
    mask_oversample: Annotated[float, Field(ge=1)] = Field(
        default=3.0, description="candidates drawn for each sampled point (lineage: PointRend)"
    )
    mask_importance: Share = Field(
        default=0.75, description="of the sampled points are the least certain candidates (lineage: PointRend)"
    )
    plain: bool = Field(
        default=False,
        description="markers and codes count as text, which is plain next-token loss, for the study of the objectives",
    )

    @model_validator(mode="after")
    def _plain(self) -> LossWeights:
        others = ("marker", "token", "count", "reconstruction")
        if self.plain and any(getattr(self, name) for name in others):
            raise ValueError(f"plain is true, so {', '.join(others)} have no tokens: set them to 0")
        return self


class TrainRecipe(Section):
    workers: Positive | tuple[Positive, Positive] = Field(
        description="or [fewest, most]: as many as there is room for, and others as machines come and go"
    )
    resize_every_s: Annotated[float, Field(ge=0)] = Field(
        default=60.0, description="how often a run with [fewest, most] workers looks whether there is room for more"
    )
    allowed_workers: tuple[Positive, ...] = (1, 2, 4, 8)
    steps: Positive
    global_batch: Positive
    micro_batch: Positive = Field(description="samples per forward on one worker")
    pack: bool = Field(
        default=False,
        description="samples of a micro-batch behind one another in rows of model.max_length tokens, each seeing itself"
        " alone; else one padded row a sample. Changes no sample's loss",
    )
    bucket: bool = Field(
        default=False,
        description="a worker's samples of a global batch are ordered by length before they are cut into micro-batches:"
        " less padding. Changes neither a global batch's samples nor its loss",
    )
    zero_stage: Literal[1, 2, 3]
    precision: Literal["fp32", "bf16", "bf16_autocast", "auto"] = Field(
        description="bf16: weights in bf16 beside fp32 masters; bf16_autocast: weights in fp32, products in bf16;"
        " auto: bf16_autocast where every worker's device computes bfloat16, fp32 where one would only emulate it"
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none", description="what waits in the CPU's memory: the optimizer's state, with stage 3 weights too"
    )
    recompute: bool = Field(
        default=False,
        description="activations of the language model and the vision tower are computed again in the backward pass"
        " rather than kept: less memory, more time, the same gradients",
    )
    deepspeed: dict[str, Any] = Field(
        default={}, description="DeepSpeed's own settings, passed through where no field here says the same"
    )
    threads: Positive = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    peak_flops: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="floating-point operations a second of one worker's device in `precision`, as its maker says, such"
        " as 989e12 of an H100 in bf16; then the log says which share of it the model's own operations use",
    )
    samples_every: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="steps, after which the model as it stands writes a few fixed samples of the mixture, shown as a"
        " picture under runs/RUN/samples and in TensorBoard; 0: never",
    )
    samples_shown: Positive = Field(default=4, description="how many; the first that write masks or a depth block")
    mlflow: str | None = Field(
        default=None,
        description="tracking address, such as sqlite:///mlruns.db or http://HOST:5000, to which rank 0 logs what"
        " TensorBoard gets; needs the extra `mlflow`. Its user and password stand in MLFLOW_TRACKING_USERNAME and"
        " MLFLOW_TRACKING_PASSWORD, and never here",
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(description="of the language model and the vision tower")
    embedding_learning_rate: Annotated[float, Field(gt=0)] = Field(
        description="of input embeddings and output head, where the spatial tokens start at the mean of the others"
    )
    projector_learning_rate: Annotated[float, Field(gt=0)] = Field(
        description="of the mask projector, which starts at random"
    )
    mask_learning_rate: Annotated[float, Field(gt=0)] = Field(description="of SAM2's mask decoder")
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Weight
    clip: Annotated[float, Field(gt=0)] = 1.0
    warmup: Share = Field(description="share of the steps in which learning rates rise to their peak")
    checkpoint_every: Positive
    keep_checkpoints: Positive = Field(
        description="so many with the least loss, as the mean of the steps since the one before, and the latest"
    )
    publish_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the published weights; auto: as they were trained"
    )
    room_within_s: Annotated[float, Field(ge=0)] = Field(
        default=600.0, description="a cluster may take so long to have room for the fewest workers, then `train` ends"
    )
    preflight: bool = Field(
        default=True,
        description="before the first step one is taken on the run's heaviest micro-batches, and thrown away, so that"
        " memory or room in model.max_length is missed then and not at step 9,000",
    )
    preflight_steps: Positive | None = Field(
        default=None, description="look for them in so many steps, spread evenly; none: in all"
    )
    max_failures: Annotated[int, Field(ge=0)] = 1
    max_skipped_steps: Positive = Field(
        default=3,
        description="in a row, their gradients not finite, after which the run stops and names their samples",
    )
    cache_dir: str | None = Field(
        default=None,
        description="folder on the machine's own disk where its workers keep row groups read from S3",
    )
    cache_gb: Annotated[float, Field(gt=0)] = Field(
        default=100.0, description="at most so much is kept there; what was used longest ago goes first"
    )
    unreadable: Literal["stop", "skip"] = Field(
        default="stop",
        description="what becomes of a run that meets a damaged row group, read again some times: it stops, or goes on"
        " without that row group's samples, which no others replace; log and metrics.jsonl name and count them",
    )
    code_noise: Share = Field(
        description="share of the depth codes that are read as random ones, so that the next one depends on the image"
        " and not on the last ones alone (reconstruction; 0 in the lineage)"
    )
    auto_share: Share = Field(
        default=0.5,
        description="of the dialogues leave a part of the reply to the model, as a request does unless it says"
        " otherwise (reconstruction)",
    )
    streams: Positive = Field(description="canonical streams of the mixture, C")
    mixture: tuple[MixtureEntry, ...]
    temperature: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="the mixture's weights come from its sources' sizes, rows ** (1 / temperature): 1 is in proportion,"
        " more is evener; then no entry has a weight of its own",
    )
    schedule: tuple[WeightChange, ...] = Field(
        default=(), description="other weights from some step on; the mixture's own stand until the first of them"
    )
    losses: LossWeights

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def possible_workers(self) -> range:
        """All numbers of workers that a run may have."""
        fewest, most = (self.workers, self.workers) if isinstance(self.workers, int) else self.workers
        return range(fewest, most + 1)

    @model_validator(mode="after")
    def _batches(self) -> TrainRecipe:
        if not self.possible_workers:
            raise ValueError(f"workers is {list(self.workers)}, expected [fewest, most]")  # type: ignore[arg-type]
        for world in {*self.allowed_workers, *self.possible_workers}:
            if self.global_batch % world or self.streams % world:
                raise ValueError(
                    f"global_batch {self.global_batch} and streams {self.streams} must both divide by every possible"
                    f" and allowed number of workers; {world} does not: change workers, allowed_workers or the sizes"
                )
        if self.global_batch % self.streams:
            raise ValueError(f"global_batch {self.global_batch} must be a multiple of streams {self.streams}")
        for world in self.possible_workers:
            if (self.global_batch // world) % self.micro_batch:
                raise ValueError(
                    f"micro_batch {self.micro_batch} does not divide the {self.global_batch // world}"
                    f" samples of one worker (global_batch {self.global_batch} / {world} workers)"
                )
        return self

    @model_validator(mode="after")
    def _deepspeed(self) -> TrainRecipe:
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(
                f"offload is 'all' with zero_stage {self.zero_stage}, expected 3: others keep weights whole"
            )
        require_passable(self.deepspeed)
        return self

    @model_validator(mode="after")
    def _mlflow(self) -> TrainRecipe:
        if self.mlflow is not None and urlsplit(self.mlflow).password is not None:
            raise ValueError(  # without the address: errors are logged
                "mlflow: the address holds a password, expected none, since recipes are kept and shown: set"
                " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where workers run"
            )
        return self

    @model_validator(mode="after")
    def _weights(self) -> TrainRecipe:
        names = [entry.called for entry in self.mixture]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"mixture: entries are named twice: {doubled}; give each a `name` of its own")
        own = [entry.called for entry in self.mixture if entry.weight is not None]
        if self.temperature is not None and own:
            raise ValueError(
                f"temperature is {self.temperature:g}, and {own} have weights too: leave out one of the two"
            )
        if self.temperature is None and len(own) < len(names):
            lost = [name for name in names if name not in own]
            raise ValueError(f"mixture: {lost} have no weight, expected one each, or a `temperature` for all")
        for before, change in zip((0, *(change.step for change in self.schedule)), self.schedule, strict=False):
            if not before < change.step < self.steps:
                raise ValueError(
                    f"schedule: step {change.step} comes after step {before} of {self.steps}, expected rising steps"
                )
            if change.weights.keys() != set(names):
                raise ValueError(
                    f"schedule: the weights from step {change.step} name {sorted(change.weights)}, expected each of"
                    f" {sorted(names)}; 0 leaves one out"
                )
            if not any(change.weights.values()):
                raise ValueError(f"schedule: the weights from step {change.step} are all 0, expected one above")
        return self
