"""What `forget` was told: ROOT/forgotten/*.json, one file a request; `ingest` never takes such an image in again."""

from __future__ import annotations

import posixpath

from pydantic import BaseModel, ConfigDict, ValidationError

from workflows.store import DamagedTableError, Root

FOLDER = "forgotten"


class Request(BaseModel):
    """One deletion request, as it stands on disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ids: tuple[str, ...]  # hashes of stored bytes: nothing of the image itself
    at: str  # UTC, ISO 8601
    made_from_them: tuple[str, ...] = ()  # folders that had seen them: codebook, model, runs/...


def requests(root: Root) -> list[Request]:
    """Every request so far, oldest first. Raises DamagedTableError for one that cannot be read."""
    paths = [posixpath.join(FOLDER, name) for name in root.files(FOLDER) if name.endswith(".json")]
    found = []
    for path, data in root.read_many(paths).items():
        try:
            found.append(Request.model_validate_json(data or b""))
        except ValidationError as error:
            raise DamagedTableError(f"{path} cannot be read: {error}; restore it: it keeps images out") from error
    return found


def forgotten_ids(root: Root) -> set[str]:
    """The ids that must not come back."""
    return {key for request in requests(root) for key in request.ids}
