"""What a finished table or checkpoint is: counts, files, digests. Its presence means complete."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from schemas.tables import READABLE_VERSIONS, SCHEMA_VERSION

MANIFEST_NAME = "manifest.json"


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(Frozen):
    """One file of a table or checkpoint."""

    path: str  # relative to the folder that holds the manifest
    rows: int = Field(ge=0)
    size: int = Field(ge=0)  # bytes
    sha256: str


class ShardCommit(Frozen):
    """A shard's marker: written by exclusive create, so one attempt wins. The highest revision of a shard counts."""

    shard: int = Field(ge=0)
    revision: int = Field(default=0, ge=0)  # + 1 each time that rows were taken out, tried again or made from others
    attempt: str
    inputs: dict[str, str] = {}  # table -> content digest of that table's shard, from which this one is made
    read: int = Field(ge=0)
    kept: int = Field(ge=0)
    rejected: int = Field(ge=0)
    reasons: dict[str, int]  # rejects by reason
    content: str  # digest of the kept rows' content, independent of the attempt
    data: FileEntry | None  # None where no row was kept
    rejects: FileEntry | None  # None where no row was rejected

    @model_validator(mode="after")
    def _balance(self) -> ShardCommit:
        if self.read != self.kept + self.rejected or self.rejected != sum(self.reasons.values()):
            raise ValueError(
                f"shard {self.shard}: read {self.read} != kept {self.kept} + rejected {self.rejected}"
                f" (reasons {self.reasons}): rows were lost"
            )
        return self


class Licence(Frozen):
    """A part that came from somewhere, and on what terms."""

    part: str  # "teacher", "sam2", "backbone", "data: NAME"
    source: str
    licence: str  # an SPDX identifier where there is one
    digest: str = ""
    non_commercial: bool = False


class Manifest(Frozen):
    """The last file written of a table, codebook, checkpoint or evaluation."""

    schema_version: int = SCHEMA_VERSION
    stage: str
    source: str = ""
    attempt: str
    recipe: str  # digest of the recipe
    code: str  # version of the package, and the commit where it is known
    inputs: dict[str, str] = {}  # what all rows depend on: name -> digest of settings, weights, codebook
    licences: tuple[Licence, ...] = ()
    read: int = Field(default=0, ge=0)
    kept: int = Field(default=0, ge=0)
    rejected: int = Field(default=0, ge=0)
    shards: tuple[ShardCommit, ...] = ()
    files: tuple[FileEntry, ...] = ()  # of a folder that is not a table
    seconds: float = 0.0
    digest: str  # of the content: the same for an undisturbed and an interrupted run
    extra: dict[str, Any] = {}  # stage-specific figures, e.g. the codebook's report

    @model_validator(mode="after")
    def _checks(self) -> Manifest:
        if self.schema_version not in READABLE_VERSIONS:
            raise ValueError(
                f"manifest of stage '{self.stage}' has schema version {self.schema_version};"
                f" this code reads {READABLE_VERSIONS}: use a matching release or rebuild the table"
            )
        if self.read != self.kept + self.rejected:
            raise ValueError(f"read {self.read} != kept {self.kept} + rejected {self.rejected}: rows were lost")
        return self
