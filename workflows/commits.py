"""The commit protocol: every shard of a table once, whoever works on it and however often it is started.

    ROOT/TABLE/SOURCE/part-000007-ATTEMPT.parquet           rows that were kept
    ROOT/rejects/STAGE/SOURCE/part-000007-ATTEMPT.parquet   rows that were refused, with the reason
    ROOT/TABLE/SOURCE/_commits/000007.json                  the marker: its exclusive create decides which attempt won
    ROOT/TABLE/SOURCE/part-000007.1-ATTEMPT.parquet         rows of its next revision
    ROOT/TABLE/SOURCE/_commits/000007.1.json                the marker of that revision, which counts from now on
    ROOT/TABLE/SOURCE/_commits/plan.json                    what all rows depend on: settings, weights, codebook
    ROOT/TABLE/SOURCE/manifest.json                         written last: the table is complete

A file that the last marker of its shard does not name does not exist for any reader. A shard gets a new revision where
rows are taken out of it (doubles, `forget`), tried again (`requeue`), or where the shards that it is made from changed.
A table that is being changed has no manifest. ROOT is a local folder or an s3:// address: both have an
exclusive create (a hard link; `If-None-Match: *`), which is all that the protocol needs of a store.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from schemas.manifest import MANIFEST_NAME, FileEntry, Manifest, ShardCommit
from schemas.tables import REJECTS, TABLES
from workflows.store import DamagedTableError, OtherInputsError, Root, StageError, write_manifest

STAGE_OF = {
    "listing": "ingest",
    "images": "ingest",
    "depth": "depth",
    "masks": "masks",
    "codes": "tokenize",
    "samples": "assemble",
}
PLAN = "plan.json"
ROW_GROUP_ROWS = 10_000
PART = re.compile(r"part-(\d+)(?:\.(\d+))?-[^~]+\.parquet")  # with a ~ behind it is a draft, which may be growing
MARKER = re.compile(r"(\d+)(?:\.(\d+))?\.json")


class Table:
    """One table of one source under a root, shard by shard."""

    def __init__(self, root: Root, name: str, source: str) -> None:
        if name not in TABLES:
            raise StageError(f"table '{name}' is unknown; known: {sorted(TABLES)}")
        self.root, self.name, self.source = root, name, source
        self.stage = STAGE_OF[name]
        self.schema = TABLES[name]
        self._rejects = "listing" if name == "listing" else self.stage  # `ingest` fills two tables

    def __str__(self) -> str:
        return f"{self.name}/{self.source}"

    def plan(self, inputs: Mapping[str, str]) -> None:
        """Fixes what all rows are made from, before the first. Raises OtherInputsError if it was fixed otherwise.

        Raises StageError for a store whose exclusive create replaces files.
        """
        wanted = dict(inputs)
        standing = self.root.read(self.name, self.source, "_commits", PLAN)
        if standing is None:
            self.root.require_exclusive_create(self.name, self.source, "_commits")
            if self.root.create(_json(wanted), self.name, self.source, "_commits", PLAN):
                return
            standing = self._read("_commits", PLAN)
        require_same(str(self), json.loads(standing), wanted)

    def planned(self) -> dict[str, str] | None:
        """What `plan` fixed, None where it never did. Raises DamagedTableError where it cannot be read."""
        data = self.root.read(self.name, self.source, "_commits", PLAN)
        try:
            return None if data is None else dict(json.loads(data))
        except ValueError as error:
            raise DamagedTableError(
                f"{self}: _commits/{PLAN} cannot be read: {error}; restore it, or delete it and run `{self.stage}`"
            ) from error

    def committed(self) -> dict[int, ShardCommit]:
        """The marker of every committed shard's last revision, by shard number."""
        names = {shard: _marker_name(shard, revision) for shard, revision in self.revisions().items()}
        folder = posixpath.join(self.name, self.source, "_commits")
        texts = self.root.read_many([posixpath.join(folder, name) for name in names.values()])
        return {shard: self._marker(name, texts[posixpath.join(folder, name)]) for shard, name in names.items()}

    def revisions(self) -> dict[int, int]:
        """The last revision of every committed shard, by shard number, from the markers' names alone."""
        last: dict[int, int] = {}
        for name in self.root.files(self.name, self.source, "_commits"):
            if found := MARKER.fullmatch(name):
                shard, revision = int(found[1]), int(found[2] or 0)
                last[shard] = max(last.get(shard, 0), revision)
        return dict(sorted(last.items()))

    def find(self, shard: int) -> ShardCommit | None:
        """The marker of one shard's last revision, None where it is not committed."""
        found: ShardCommit | None = None
        while True:
            name = _marker_name(shard, 0 if found is None else found.revision + 1)
            data = self.root.read(self.name, self.source, "_commits", name)
            if data is None:
                return found
            found = self._marker(name, data)

    def commit(
        self,
        shard: int,
        attempt: str,
        table: pa.Table,
        rejects: pa.Table,
        read: int,
        row_group_rows: int = ROW_GROUP_ROWS,
        *,
        inputs: Mapping[str, str] | None = None,
        revision: int = 0,
    ) -> ShardCommit:
        """The shard's marker: this attempt's, or the other one's where another attempt was first.

        table has the table's schema, rejects that of REJECTS; read counts the rows that came in; inputs are the content
        digests of the shards that this one is made from. The loser's files are deleted here. Raises ValueError for
        another schema, a doubled id, or read != kept + rejected.
        """
        for rows, schema in ((table, self.schema), (rejects, REJECTS)):
            if not rows.schema.equals(schema):
                raise ValueError(f"{self} shard {shard}: columns are\n{rows.schema}\nexpected\n{schema}")
        doubled = [key for key, n in Counter(table["id"].to_pylist()).items() if n > 1]
        if doubled:
            raise ValueError(f"{self} shard {shard}: {len(doubled)} ids stand twice, e.g. {doubled[0]}: reject one")
        part = f"part-{_revision(shard, revision)}-{attempt}.parquet"
        entry, data = _parquet(part, table, row_group_rows)
        rejects_entry, rejects_data = _parquet(self._rejects_path(part), rejects, row_group_rows)
        commit = ShardCommit(
            shard=shard,
            revision=revision,
            attempt=attempt,
            inputs=dict(inputs or {}),
            read=read,
            kept=table.num_rows,
            rejected=rejects.num_rows,
            reasons=dict(sorted(Counter(rejects["reason"].to_pylist()).items())),
            content=content_digest(table),
            data=entry,
            rejects=rejects_entry,
        )
        written = [(e.path, d) for e, d in ((entry, data), (rejects_entry, rejects_data)) if e is not None]
        for path, content in written:
            self.root.write(content, self.name, self.source, path)
        name = _marker_name(shard, revision)
        if self.root.create(commit.model_dump_json(indent=1).encode(), self.name, self.source, "_commits", name):
            return commit
        for path, _ in written:
            self.root.delete(self.name, self.source, path)
        return self._marker(name, self._read("_commits", name))

    def read_shard(self, shard: int, columns: Sequence[str] | None = None, *, content: str | None = None) -> pa.Table:
        """The kept rows of a committed shard, in order.

        Raises DamagedTableError for a file that was changed, and where `content` is given and is not the digest of the
        rows that stand: they were changed since the caller planned with them.
        """
        commit = self.find(shard)
        if commit is None:
            raise DamagedTableError(f"{self} shard {shard} is not committed: run `{self.stage}` first")
        if content is not None and commit.content != content:
            raise DamagedTableError(
                f"{self} shard {shard} holds {commit.content[:16]}, expected {content[:16]}: it was changed while this"
                " stage ran; run the stage again"
            )
        return self.rows_of(commit, columns)

    def rows_of(self, commit: ShardCommit, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows that a marker stands for, in order. Raises DamagedTableError for a file that was changed."""
        if commit.data is None:
            empty = self.schema.empty_table()
            return empty if columns is None else empty.select(list(columns))
        return self._parse(commit.data, columns)

    def rejects_of(self, commit: ShardCommit) -> pa.Table:
        """The refused rows that a marker stands for. Raises DamagedTableError for a file that was changed."""
        return REJECTS.empty_table() if commit.rejects is None else self._parse(commit.rejects, None)

    def ids_of(self, commit: ShardCommit) -> list[str]:
        """The ids that a marker stands for, in order; reads nothing else of the file, so no checksum is compared."""
        if commit.data is None:
            return []
        ids: list[str] = self.root.columns(["id"], self.name, self.source, commit.data.path)["id"].to_pylist()
        return ids

    def row_group_rows(self, commit: ShardCommit) -> int:
        """Rows in a row group of the shard's file, for a revision to keep to."""
        if commit.data is None:
            return ROW_GROUP_ROWS
        rows: int = pq.ParquetFile(io.BytesIO(self.checked(commit.data))).metadata.row_group(0).num_rows
        return rows

    def reopen(self) -> None:
        """Takes the manifest away: the table is about to change."""
        self.root.delete(self.name, self.source, MANIFEST_NAME)

    def finish(self, commits: Mapping[int, ShardCommit], **fields: Any) -> Manifest:
        """Writes the manifest of a table whose shards are all in `commits`, after deleting what lost attempts left.

        fields: those of Manifest that the table does not know: attempt, recipe, code, inputs, licences, seconds, extra.
        """
        shards = tuple(commits[shard] for shard in sorted(commits))
        self.clean(commits)
        manifest = Manifest(
            stage=self.stage,
            source=self.source,
            read=sum(commit.read for commit in shards),
            kept=sum(commit.kept for commit in shards),
            rejected=sum(commit.rejected for commit in shards),
            shards=shards,
            digest=table_digest(shards),
            **fields,
        )
        write_manifest(self.root, manifest, self.name, self.source)
        return manifest

    def manifest(self) -> Manifest | None:
        """The table's manifest, None where it is not finished."""
        return self.root.manifest(self.name, self.source)

    def require(self) -> Manifest:
        """The table's manifest. Raises StageError where the table is not finished."""
        manifest = self.manifest()
        if manifest is None:
            raise StageError(f"{self.root.uri}: {self} has no {MANIFEST_NAME}: run `{self.stage}` first")
        return manifest

    def unnamed(self, commits: Mapping[int, ShardCommit] | None = None) -> list[str]:
        """Files of the table and its rejects that no last marker names, relative to the table's folder."""
        commits = self.committed() if commits is None else commits
        known = {entry.path for c in commits.values() for entry in (c.data, c.rejects) if entry is not None}
        found = [name for name in self.root.files(self.name, self.source) if name != MANIFEST_NAME]
        found += [self._rejects_path(name) for name in self.root.files("rejects", self._rejects, self.source)]
        return [path for path in found if path not in known]

    def clean(self, commits: Mapping[int, ShardCommit] | None = None) -> list[str]:
        """Deletes what lost attempts and older revisions left of committed shards, and says which files."""
        strays = self.lost(commits)
        for path in strays:
            self.root.delete(self.name, self.source, path)
        return strays

    def lost(self, commits: Mapping[int, ShardCommit] | None = None) -> list[str]:
        """Unnamed files that no marker can ever name: their revision of the shard, or a later one, is committed.

        All others may be someone's work that is about to be committed.
        """
        commits = self.committed() if commits is None else commits
        parts = [(path, PART.fullmatch(posixpath.basename(path))) for path in self.unnamed(commits)]
        return [
            path
            for path, part in parts
            if part is not None and int(part[1]) in commits and int(part[2] or 0) <= commits[int(part[1])].revision
        ]

    def checked(self, entry: FileEntry) -> bytes:
        """A file's bytes. Raises DamagedTableError where they are missing or not those that were committed."""
        data = self.root.read(self.name, self.source, entry.path)
        if data is None:
            raise DamagedTableError(f"{self}: file {entry.path} is missing: {self.remedy(shard_of(entry.path))}")
        seen = hashlib.sha256(data).hexdigest()
        if len(data) != entry.size or seen != entry.sha256:
            raise DamagedTableError(
                f"{self}: file {entry.path} has {len(data)} bytes and sha256 {seen[:16]}, its marker says"
                f" {entry.size} and {entry.sha256[:16]}: it was changed; {self.remedy(shard_of(entry.path))}"
            )
        return data

    def remedy(self, shard: int) -> str:
        """What to do about a shard that is damaged. Its markers go, all revisions, or a lost one would count again."""
        return (
            f"restore it, or delete {self}/{MANIFEST_NAME} and {self}/_commits/{shard:06d}*.json and run"
            f" `{self.stage}` again"
        )

    def _parse(self, entry: FileEntry, columns: Sequence[str] | None) -> pa.Table:
        return pq.read_table(io.BytesIO(self.checked(entry)), columns=None if columns is None else list(columns))

    def _marker(self, name: str, data: bytes | None) -> ShardCommit:
        if data is None:
            raise DamagedTableError(f"{self}: marker {name} went away while it was read: is a `clean` running?")
        try:
            commit = ShardCommit.model_validate_json(data)
        except ValidationError as error:
            remedy = self.remedy(int(name[:6]))
            raise DamagedTableError(f"{self}: marker {name} cannot be read: {error}; {remedy}") from error
        if _marker_name(commit.shard, commit.revision) != name:
            raise DamagedTableError(
                f"{self}: marker {name} is that of shard {commit.shard}, revision {commit.revision}: a copy; delete it,"
                f" and where it replaced the right one, {self.remedy(int(name[:6]))}"
            )
        return commit

    def _read(self, *parts: str) -> bytes:
        data = self.root.read(self.name, self.source, *parts)
        if data is None:
            raise DamagedTableError(
                f"{self}: {posixpath.join(*parts)} went away while it was read: is a `clean` running?"
            )
        return data

    def _rejects_path(self, part: str) -> str:
        return posixpath.join("..", "..", "rejects", self._rejects, self.source, part)


def _marker_name(shard: int, revision: int) -> str:
    return f"{_revision(shard, revision)}.json"


def _revision(shard: int, revision: int) -> str:
    return f"{shard:06d}.{revision}" if revision else f"{shard:06d}"


def shard_of(path: str) -> int:
    """The number of the shard whose part file lies at `path`."""
    part = PART.fullmatch(posixpath.basename(path))
    if part is None:
        raise DamagedTableError(
            f"a marker names file '{path}', expected part-NUMBER-ATTEMPT.parquet: restore the marker"
        )
    return int(part[1])


def content_digest(table: pa.Table) -> str:
    """Hex SHA-256 of a table's rows in order: the same for any chunks, file encoding or attempt."""
    digest = hashlib.sha256()
    for name in table.schema.names:
        column = table[name]
        if not _is_bytes(column.type):  # one array of bytes ends at 2 GiB, a column of images may not
            column = column.combine_chunks()
        digest.update(f"{name}:{len(column)}".encode())
        for buffer in _canonical(column):
            digest.update(buffer)
    return digest.hexdigest()


def table_digest(shards: Sequence[ShardCommit]) -> str:
    """Hex SHA-256 over what the shards hold, whoever committed them."""
    return hashlib.sha256(_json([(c.shard, c.read, c.content, c.reasons) for c in shards])).hexdigest()


def require_same(what: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raises OtherInputsError, naming both sides, where what stands on disk was made from something else."""
    keys = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if keys:
        sides = "; ".join(f"{key} {found.get(key, 'none')[:24]}, now {wanted.get(key, 'none')[:24]}" for key in keys)
        raise OtherInputsError(
            f"{what} was made from other inputs or settings: {sides}. Choose another root, or delete it"
        )


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_string(kind))


def _canonical(array: pa.Array | pa.ChunkedArray) -> Iterator[bytes | memoryview]:
    """The values of an array as bytes that say nothing of offsets, padding or unused null slots."""
    if array.null_count:
        yield np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes()
    kind = array.type
    if pa.types.is_struct(kind):
        for child in array.flatten():
            yield from _canonical(child)
    elif pa.types.is_list(kind):
        yield pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False).tobytes()
        yield from _canonical(array.flatten())
    elif _is_bytes(kind):
        yield pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False).tobytes()
        yield from (memoryview(value.as_buffer()) for value in array if value.is_valid)
    else:
        yield array.fill_null(False if pa.types.is_boolean(kind) else 0).to_numpy(zero_copy_only=False).tobytes()


def _parquet(path: str, table: pa.Table, row_group_rows: int) -> tuple[FileEntry | None, bytes]:
    if table.num_rows == 0:
        return None, b""
    stream = io.BytesIO()
    how = {"compression": "zstd", "write_statistics": ["id"], "write_page_checksum": True}  # so that damage is seen
    pq.write_table(table, stream, row_group_size=row_group_rows, **how)
    data = stream.getvalue()
    return FileEntry(path=path, rows=table.num_rows, size=len(data), sha256=hashlib.sha256(data).hexdigest()), data


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
