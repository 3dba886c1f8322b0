"""The commit protocol: every shard of a table once, whoever works on it and however often it is started.

    ROOT/TABLE/SOURCE/part-000007-ATTEMPT.parquet           rows that were kept
    ROOT/rejects/STAGE/SOURCE/part-000007-ATTEMPT.parquet   rows that were refused, with the reason
    ROOT/TABLE/SOURCE/_commits/000007.json                  the marker: its exclusive create decides which attempt won
    ROOT/TABLE/SOURCE/_commits/plan.json                    the inputs that the shards are made from
    ROOT/TABLE/SOURCE/manifest.json                         written last: the table is complete

A file that no marker names does not exist for any reader. ROOT is a local folder or an s3:// address: both have an
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

STAGE_OF = {"images": "ingest", "depth": "depth", "masks": "masks", "codes": "tokenize", "samples": "assemble"}
PLAN = "plan.json"
PART = re.compile(r"part-(\d+)-")


class Table:
    """One table of one source under a root, shard by shard."""

    def __init__(self, root: Root, name: str, source: str) -> None:
        if name not in TABLES:
            raise StageError(f"table '{name}' is unknown; known: {sorted(TABLES)}")
        self.root, self.name, self.source = root, name, source
        self.stage = STAGE_OF[name]
        self.schema = TABLES[name]

    def __str__(self) -> str:
        return f"{self.name}/{self.source}"

    def plan(self, inputs: Mapping[str, str]) -> None:
        """Fixes what the shards are made from, before the first. Raises OtherInputsError if it was fixed otherwise."""
        wanted = dict(inputs)
        if self.root.create(_json(wanted), self.name, self.source, "_commits", PLAN):
            return
        require_same(str(self), json.loads(self._read("_commits", PLAN)), wanted)

    def committed(self) -> dict[int, ShardCommit]:
        """The marker of every committed shard, by shard number."""
        names = [name for name in self.root.files(self.name, self.source, "_commits") if name != PLAN]
        commits = (self._marker(name, self._read("_commits", name)) for name in names if name.endswith(".json"))
        return {commit.shard: commit for commit in commits}

    def find(self, shard: int) -> ShardCommit | None:
        """The marker of one shard, None where it is not committed."""
        name = f"{shard:06d}.json"
        data = self.root.read(self.name, self.source, "_commits", name)
        return None if data is None else self._marker(name, data)

    def commit(
        self, shard: int, attempt: str, table: pa.Table, rejects: pa.Table, read: int, row_group_rows: int = 10_000
    ) -> ShardCommit:
        """The shard's marker: this attempt's, or the other one's where another attempt was first.

        table has the table's schema, rejects that of REJECTS; read counts the rows that came in. The loser's files
        are deleted here. Raises ValueError for another schema, a doubled id, or read != kept + rejected.
        """
        for rows, schema in ((table, self.schema), (rejects, REJECTS)):
            if not rows.schema.equals(schema):
                raise ValueError(f"{self} shard {shard}: columns are\n{rows.schema}\nexpected\n{schema}")
        doubled = [key for key, n in Counter(table["id"].to_pylist()).items() if n > 1]
        if doubled:
            raise ValueError(f"{self} shard {shard}: {len(doubled)} ids stand twice, e.g. {doubled[0]}: reject one")
        part = f"part-{shard:06d}-{attempt}.parquet"
        entry, data = _parquet(part, table, row_group_rows)
        rejects_entry, rejects_data = _parquet(self._rejects_path(part), rejects, row_group_rows)
        commit = ShardCommit(
            shard=shard,
            attempt=attempt,
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
        name = f"{shard:06d}.json"
        if self.root.create(commit.model_dump_json(indent=1).encode(), self.name, self.source, "_commits", name):
            return commit
        for path, _ in written:
            self.root.delete(self.name, self.source, path)
        return self._marker(name, self._read("_commits", name))

    def read_shard(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The kept rows of a committed shard, in order. Raises DamagedTableError for a file that was changed."""
        commit = self.find(shard)
        if commit is None:
            raise DamagedTableError(f"{self} shard {shard} is not committed: run `{self.stage}` first")
        if commit.data is None:
            empty = self.schema.empty_table()
            return empty if columns is None else empty.select(list(columns))
        return pq.read_table(io.BytesIO(self.checked(commit.data)), columns=columns)

    def finish(self, commits: Mapping[int, ShardCommit], **fields: Any) -> Manifest:
        """Writes the manifest of a table whose shards are all in `commits`, after deleting what lost attempts left.

        fields: those of Manifest that the table does not know: attempt, recipe, code, inputs, licences, seconds, extra.
        """
        shards = tuple(commits[shard] for shard in sorted(commits))
        self.clean()
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

    def unnamed(self) -> list[str]:
        """Files of the table and its rejects that no marker names, relative to the table's folder."""
        commits = self.committed()
        known = {entry.path for c in commits.values() for entry in (c.data, c.rejects) if entry is not None}
        found = [name for name in self.root.files(self.name, self.source) if name != MANIFEST_NAME]
        found += [self._rejects_path(name) for name in self.root.files("rejects", self.stage, self.source)]
        return [path for path in found if path not in known]

    def clean(self) -> list[str]:
        """Deletes what killed attempts left of committed shards, and says which files; others may be someone's work."""
        commits = self.committed()
        parts = [(path, PART.match(posixpath.basename(path))) for path in self.unnamed()]
        strays = [path for path, part in parts if part is not None and int(part[1]) in commits]
        for path in strays:
            self.root.delete(self.name, self.source, path)
        return strays

    def checked(self, entry: FileEntry) -> bytes:
        """A file's bytes. Raises DamagedTableError where they are missing or not those that were committed."""
        data = self.root.read(self.name, self.source, entry.path)
        if data is None:
            raise DamagedTableError(f"{self}: file {entry.path} is missing: restore it, or delete its marker and rerun")
        seen = hashlib.sha256(data).hexdigest()
        if len(data) != entry.size or seen != entry.sha256:
            raise DamagedTableError(
                f"{self}: file {entry.path} has {len(data)} bytes and sha256 {seen[:16]}, its marker says"
                f" {entry.size} and {entry.sha256[:16]}: it was changed; restore it, or delete its marker and rerun"
            )
        return data

    def _marker(self, name: str, data: bytes) -> ShardCommit:
        try:
            return ShardCommit.model_validate_json(data)
        except ValidationError as error:
            raise DamagedTableError(f"{self}: marker {name} cannot be read: {error}; delete it and rerun") from error

    def _read(self, *parts: str) -> bytes:
        data = self.root.read(self.name, self.source, *parts)
        if data is None:
            raise DamagedTableError(
                f"{self}: {posixpath.join(*parts)} went away while it was read: is a `clean` running?"
            )
        return data

    def _rejects_path(self, part: str) -> str:
        return posixpath.join("..", "..", "rejects", self.stage, self.source, part)


def content_digest(table: pa.Table) -> str:
    """Hex SHA-256 of a table's rows in order: the same for any chunks, file encoding or attempt."""
    digest = hashlib.sha256()
    for name in table.schema.names:
        column = table[name].combine_chunks()
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


def _canonical(array: pa.Array) -> Iterator[bytes | memoryview]:
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
    elif pa.types.is_binary(kind) or pa.types.is_string(kind):
        yield pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False).tobytes()
        yield from (memoryview(value.as_buffer()) for value in array if value.is_valid)
    else:
        yield array.fill_null(False if pa.types.is_boolean(kind) else 0).to_numpy(zero_copy_only=False).tobytes()


def _parquet(path: str, table: pa.Table, row_group_rows: int) -> tuple[FileEntry | None, bytes]:
    if table.num_rows == 0:
        return None, b""
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd", row_group_size=row_group_rows, write_statistics=["id"])
    data = stream.getvalue()
    return FileEntry(path=path, rows=table.num_rows, size=len(data), sha256=hashlib.sha256(data).hexdigest()), data


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
