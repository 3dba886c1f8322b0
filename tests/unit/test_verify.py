"""Every kind of damage to every kind of table: verify names the file or shard, and says what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from schemas.manifest import MANIFEST_NAME
from schemas.tables import REJECTS, TABLES, Reason
from workflows.commits import PLAN, Table
from workflows.ingest import image_id
from workflows.shards import Reject, rejects_table
from workflows.store import DamagedTableError, open_root
from workflows.verify import problems_of

KINDS = tuple(TABLES)
MADE_OF = {"images": ["listing"], "depth": ["images"], "masks": ["images"], "codes": ["depth"]}
MADE_OF["samples"] = ["images", "codes", "masks"]
REFUSED = {"listing": (), "images": (5,), "depth": (1,), "masks": (1,), "codes": (1, 2), "samples": (1, 2)}  # by number
LISTED, SHARDS = 6, 2
REMEDY = re.compile(r"restore|delete|run `")


def image(shard: int, number: int) -> bytes:
    return b"picture %d of shard %d" % (number, shard)


def row(kind: str, shard: int, number: int) -> dict[str, Any]:
    """One row as its schema has it; every table of the chain has the same ids."""
    key = image_id(image(shard, number))
    mask = {"height": 1, "width": 1, "counts": "01"}
    values: dict[str, Any] = {"id": key, "uri": f"{number}.png", "image": image(shard, number), "width": 1, "height": 1}
    values |= {
        "turns": [],
        "masks": [mask],
        "boxes": [],
        "clicks": [],
        "recorded_depth": None,
        "inv_depth": b"map",
        "raw_min": 0.0,
    }
    values |= {"raw_max": 1.0, "predicted_iou": [1.0], "stability": [1.0], "recorded": True, "codes": [shard, number]}
    values |= {"depth_target": b"small", "reconstruction_mae": 0.1, "first": 0, "rows": 1, "size": 9, "record": ""}
    values |= {"reason": "", "message": ""}
    return {name: values[name] for name in TABLES[kind].names}


def rows(kind: str, shard: int) -> pa.Table:
    kept = range(LISTED if kind == "listing" else LISTED - 1)
    made = [row(kind, shard, number) for number in kept if number not in REFUSED[kind]]
    return pa.Table.from_pylist(made, schema=TABLES[kind])


def refused(table: Table, shard: int) -> pa.Table:
    if not REFUSED[table.name]:
        return REJECTS.empty_table()
    over = MADE_OF[table.name][0]
    ids = [image_id(image(shard, n)) for n in range(LISTED) if over == "listing" or n not in (5, *REFUSED[over])]
    wanted = [image_id(image(shard, n)) for n in REFUSED[table.name]]
    found = [Reject(Reason.CONSTANT_DEPTH, "flat", key, "", n) for n, key in enumerate(ids) if key in wanted]
    return rejects_table(table, shard, found)


def commit(table: Table, shard: int, kept: pa.Table, rejects: pa.Table, revision: int = 0) -> None:
    inputs = {kind: sibling(table, kind).require().shards[shard].content for kind in MADE_OF.get(table.name, ())}
    read = kept.num_rows + rejects.num_rows
    table.commit(shard, f"attempt{revision}", kept, rejects, read, inputs=inputs, revision=revision)


def finish(table: Table) -> None:
    table.finish(table.committed(), attempt="a", recipe="r", code="c", inputs={"settings": "s"})


def sibling(table: Table, kind: str) -> Table:
    return Table(table.root, kind, table.source)


def recommit(table: Table, shard: int, kept: pa.Table, rejects: pa.Table) -> None:
    """The shard with other rows, its marker and the manifest in full agreement with them."""
    for path in marker(table, shard).parent.glob(f"{shard:06d}*.json"):
        path.unlink()
    commit(table, shard, kept, rejects)
    finish(table)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished table of every kind, two shards each, every one but the listing with rejects."""
    folder = tmp_path_factory.mktemp("chain") / "root"
    for kind in KINDS:
        table = Table(open_root(str(folder)), kind, "rooms")
        table.plan({"settings": "s"})
        for shard in range(SHARDS):
            commit(table, shard, rows(kind, shard), refused(table, shard))
        finish(table)
    return folder


@pytest.fixture
def root(chain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chain, tmp_path / "root"))


def table_at(root: Path, kind: str) -> Table:
    return Table(open_root(str(root)), kind, "rooms")


def problems(root: Path) -> list[str]:
    return [f"{kind}: {text}" for kind in KINDS for text in problems_of(table_at(root, kind))]


def part(table: Table, shard: int) -> Path:
    (path,) = (Path(table.root.path) / table.name / "rooms").glob(f"part-{shard:06d}-*")
    return path


def reject_part(table: Table, shard: int) -> Path:
    (path,) = (Path(table.root.path) / "rejects" / table.stage / "rooms").glob(f"part-{shard:06d}-*")
    return path


def marker(table: Table, shard: int) -> Path:
    return Path(table.root.path) / table.name / "rooms" / "_commits" / f"{shard:06d}.json"


def manifest(table: Table) -> Path:
    return Path(table.root.path) / table.name / "rooms" / MANIFEST_NAME


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def another(table: Table) -> Table:
    return sibling(table, KINDS[(KINDS.index(table.name) + 1) % len(KINDS)])


def row_lost(table: Table) -> None:
    kept = rows(table.name, 1)
    recommit(table, 1, kept.slice(1), refused(table, 1))


def id_in_two_shards(table: Table) -> None:
    kept = pa.concat_tables([rows(table.name, 1).slice(1), rows(table.name, 0).slice(0, 1)])
    recommit(table, 1, kept, refused(table, 1))


def shard_without_marker_in_manifest(table: Table) -> None:
    values = json.loads(manifest(table).read_text())
    edit(manifest(table), shards=values["shards"][:1])


def counts_moved(table: Table) -> None:
    values = json.loads(marker(table, 1).read_text())
    reasons = {**values["reasons"], "too_small": 1}
    edit(marker(table, 1), kept=values["kept"] - 1, rejected=values["rejected"] + 1, reasons=reasons)


# what is done to shard 1 of a table, and what its own findings must say
DAMAGES: dict[str, tuple[Callable[[Table], object], str]] = {
    "file deleted": (lambda t: part(t, 1).unlink(), "part-000001-.* is missing"),
    "file truncated": (lambda t: part(t, 1).write_bytes(part(t, 1).read_bytes()[:-7]), "part-000001-.* was changed"),
    "file emptied": (lambda t: part(t, 1).write_bytes(b""), "part-000001-.* was changed"),
    "file lengthened": (lambda t: part(t, 1).write_bytes(part(t, 1).read_bytes() + b"x"), "part-000001-.* was changed"),
    "file flipped": (lambda t: flip(part(t, 1)), "part-000001-.* was changed"),
    "files swapped": (lambda t: swap(part(t, 0), part(t, 1)), "part-000001-.* was changed"),
    "file of another table": (lambda t: swap(part(t, 1), part(another(t), 1)), "part-000001-.* was changed"),
    "file doubled": (
        lambda t: shutil.copy(part(t, 1), part(t, 1).with_name("part-000001-copy.parquet")),
        "part-000001-copy.parquet: no marker names",
    ),
    "file doubled under a new number": (
        lambda t: shutil.copy(part(t, 1), part(t, 1).with_name("part-000009-copy.parquet")),
        "part-000009-copy.parquet: no marker names",
    ),
    "file renamed": (
        lambda t: part(t, 1).rename(part(t, 1).with_name("part-000001-b.parquet")),
        "part-000001-.* is missing",
    ),
    "marker deleted": (lambda t: marker(t, 1).unlink(), "shard 1: .*its marker says nothing"),
    "marker without fields": (lambda t: marker(t, 1).write_text("{}"), r"marker 000001.json cannot be read"),
    "marker cut off": (lambda t: marker(t, 1).write_text('{"shard": 1'), r"marker 000001.json cannot be read"),
    "marker of lost rows": (lambda t: edit(marker(t, 1), read=99), "000001.json cannot be read.*rows were lost"),
    "marker edited": (counts_moved, "shard 1: the manifest says kept"),
    "marker names another file": (lambda t: edit(marker(t, 1), data=None), "shard 1: the manifest says data"),
    "markers swapped": (lambda t: swap(marker(t, 0), marker(t, 1)), "marker 00000. ?.json is that of shard"),
    "marker doubled": (
        lambda t: shutil.copy(marker(t, 1), marker(t, 2)),
        "marker 000002.json is that of shard 1",
    ),
    "marker doubled as a revision": (
        lambda t: shutil.copy(marker(t, 1), marker(t, 1).with_name("000001.1.json")),
        "marker 000001.1.json is that of shard 1, revision 0",
    ),
    "manifest deleted": (lambda t: manifest(t).unlink(), "no manifest, 2 shards committed: run `"),
    "manifest cut off": (lambda t: manifest(t).write_text("{"), "manifest.json cannot be read"),
    "manifest of lost rows": (lambda t: edit(manifest(t), read=99), "manifest.json cannot be read.*rows were lost"),
    "manifest of more rows": (lambda t: edit(manifest(t), read=99, kept=99, rejected=0), "its shards sum to"),
    "manifest of another digest": (lambda t: edit(manifest(t), digest="0" * 64), "digest 0000000000000000 is not that"),
    "manifest without a shard": (shard_without_marker_in_manifest, "shard 1: the manifest lists nothing"),
    "manifest of another table": (lambda t: swap(manifest(t), manifest(another(t))), "shard 1: the manifest says"),
    "manifest of other inputs": (lambda t: edit(manifest(t), inputs={"settings": "x"}), "restore one of them"),
    "plan of other inputs": (lambda t: edit(marker(t, 1).with_name(PLAN), settings="x"), "restore one of them"),
    "plan cut off": (lambda t: marker(t, 1).with_name(PLAN).write_text("{"), "plan.json cannot be read"),
}
REJECT_DAMAGES: dict[str, tuple[Callable[[Table], object], str]] = {
    "rejects deleted": (lambda t: reject_part(t, 1).unlink(), "rejects/.*part-000001-.* is missing"),
    "rejects flipped": (lambda t: flip(reject_part(t, 1)), "rejects/.*part-000001-.* was changed"),
    "rejects swapped": (lambda t: swap(reject_part(t, 0), reject_part(t, 1)), "rejects/.*part-000001-.* was changed"),
    "rejects doubled": (
        lambda t: shutil.copy(reject_part(t, 1), reject_part(t, 1).with_name("part-000001-copy.parquet")),
        "rejects/.*part-000001-copy.parquet: no marker names",
    ),
    "row lost with consistent counts": (row_lost, "shard 1: (1 ids of .* neither kept nor refused|5 rows were read)"),
    "id in two shards": (id_in_two_shards, "stands in shards 0 and 1"),
}
CASES = [(kind, name, *DAMAGES[name]) for kind in KINDS for name in DAMAGES]
CASES += [(kind, name, *REJECT_DAMAGES[name]) for kind in KINDS[1:] for name in REJECT_DAMAGES]


def test_what_is_undamaged_has_no_finding(root: Path) -> None:
    assert problems(root) == []


@pytest.mark.parametrize(("kind", "name", "damage", "named"), CASES, ids=[f"{kind}-{name}" for kind, name, *_ in CASES])
def test_verify_names_the_damage_and_says_what_to_do(
    root: Path, kind: str, name: str, damage: Callable[[Table], object], named: str
) -> None:
    damage(table_at(root, kind))
    found = problems_of(table_at(root, kind))
    assert [text for text in found if re.search(named, text, re.DOTALL)], found
    assert [text for text in problems(root) if not REMEDY.search(text)] == []


@pytest.mark.parametrize(
    ("kind", "later"),
    [(kind, later) for later, kinds in MADE_OF.items() for kind in kinds],
)
def test_a_table_whose_input_changed_afterwards_is_stale(root: Path, kind: str, later: str) -> None:
    table = table_at(root, kind)
    others = {"uri": "elsewhere.png", "raw_min": -1.0, "stability": [0.5], "codes": [7, 7]}
    values = rows(kind, 1).to_pylist()
    values[0] |= {name: value for name, value in others.items() if name in values[0]}
    table.reopen()
    commit(table, 1, pa.Table.from_pylist(values, schema=TABLES[kind]), refused(table, 1), revision=1)
    finish(table)
    assert problems_of(table) == []
    expected = f"1 shards, first 1, were made from another {kind}/rooms than stands now: run `"
    assert [text for text in problems_of(table_at(root, later)) if expected in text]


@pytest.mark.parametrize("kind", ["listing", "images", "depth", "masks", "codes"])
def test_a_shard_that_came_later_is_missed_in_what_is_made_from_it(root: Path, kind: str) -> None:
    table = table_at(root, kind)
    table.commit(2, "a", TABLES[kind].empty_table(), REJECTS.empty_table(), 0)
    finish(table)
    for later in (later for later, kinds in MADE_OF.items() if kind in kinds):
        found = problems_of(table_at(root, later))
        assert [text for text in found if f"1 shards, first 2, of its input {kind} are not in it: run `" in text], found


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_shard_is_mended_as_verify_says(root: Path, kind: str) -> None:
    table = table_at(root, kind)
    commit(table, 1, rows(kind, 1), refused(table, 1), revision=1)
    finish(table)
    flip(next((root / kind / "rooms").glob("part-000001.1-*")))
    (told,) = problems_of(table)
    advice = re.search(r"or delete (\S+) and (\S+) and run `(\w+)` again", told)
    assert advice and advice[3] == table.stage
    for path in [root / advice[1], *root.glob(advice[2])]:
        path.unlink()
    assert 1 not in table.committed()
    commit(table, 1, rows(kind, 1), refused(table, 1))
    finish(table)
    for text in problems(root):  # the files of the revision that was given up
        stray = re.match(r"\w+: (\S+): no marker names this file.*: delete it", text)
        assert stray, text
        (root / kind / "rooms" / stray[1]).unlink()
    assert problems(root) == []


def test_a_store_is_asked_once_for_what_another_table_holds_and_its_damage_is_named_there_alone(root: Path) -> None:
    part(table_at(root, "images"), 1).unlink()
    assert [text.split(":")[0] for text in problems(root)] == ["images"]
    with pytest.raises(DamagedTableError, match=r"part-000001-.* is missing"):
        table_at(root, "images").read_shard(1)
