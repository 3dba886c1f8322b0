"""What a plan says before a run: rows, rates, hours, bytes, requests and money, by stage and by table."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from schemas.section import Section

PLAN_NAME = "plan.json"


class TablePlan(Section):
    """One table of one source, as it will stand."""

    table: str
    source: str
    read: int = Field(ge=0, description="rows that come in")
    kept: int = Field(ge=0)
    bytes: int = Field(ge=0, description="of its files and of its rejects' files")


class StagePlan(Section):
    """One stage over all sources; `hours` with the recipe's pool, `suggested_hours` with the suggested one."""

    stage: str
    rows: int = Field(ge=0, description="rows that come in; of the codebook, maps that are looked at in training")
    shards: int = Field(ge=0)
    rows_per_s_actor: float = Field(ge=0)
    cores_per_actor: float = Field(ge=0, description="cores that an actor kept busy in the sample")
    memory_gb: float = Field(ge=0, description="peak memory of an actor in the sample")
    actors: int = Field(ge=1, description="of the recipe's pool, or as many of them as can work at once")
    hours: float = Field(ge=0)
    preparing_hours: float = Field(ge=0, description="part of both hours before the first look at the tables")
    suggested_actors: int = Field(ge=1)
    suggested_hours: float = Field(ge=0)
    machine: str = Field(description="kind of machine, '' where the recipe names none")
    machines: int = Field(ge=0, description="machines of that kind that the suggested actors fill")
    puts: int = Field(ge=0, description="PUT, POST and LIST requests, where the root is an S3 store")
    gets: int = Field(ge=0, description="GET and HEAD requests, where root and sources are S3 stores")
    usd: float | None = Field(description="of the machines for the suggested hours; none without their prices")


class TrainingPlan(Section):
    """What `train` holds on each worker before any activation: a worker's bytes at the most workers of the recipe."""

    parameters: int = Field(ge=0)
    trained: int = Field(ge=0)
    workers: int = Field(ge=1)
    zero_stage: int
    precision: str
    weights: int = Field(ge=0)
    gradients: int = Field(ge=0)
    optimizer: int = Field(ge=0)
    offloaded: int = Field(ge=0, description="bytes of it that wait in the machine's memory instead")


class Plan(Section):
    """A run's cost in advance. Stages run one after another, so the hours add up."""

    schema_version: Literal[1] = 1
    recipe: str = Field(description="digest of the recipe that it is for")
    name: str
    made: str = Field(description="time, UTC")
    code: str
    cores: int = Field(description="physical cores of the machine that the sample ran on")
    sample_rows: int = Field(description="rows that the sample's ingest read")
    stages: tuple[StagePlan, ...]
    tables: tuple[TablePlan, ...]
    bottleneck: str = Field(description="the stage with most of the suggested hours")
    hours: float
    suggested_hours: float
    bytes: int
    puts: int
    gets: int
    machines_usd: float | None
    requests_usd: float | None
    storage_usd_per_month: float | None
    training: TrainingPlan | None = Field(
        default=None, description="none where the configurations of base and segmenter could not be read"
    )
    notes: tuple[str, ...] = ()

    def stage(self, name: str) -> StagePlan:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.stage == name)

    def table(self, name: str, source: str) -> TablePlan | None:
        """The plan of one table, None where the source was not planned."""
        return next((table for table in self.tables if (table.table, table.source) == (name, source)), None)
