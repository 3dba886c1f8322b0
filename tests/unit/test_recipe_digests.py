"""What names tables, runs and models: their settings' digests, which a new field with a default leaves as they are."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

import schemas
from schemas.recipe import section_digest
from schemas.section import Section

DEFAULTS = Path(__file__).parents[1] / "data" / "recipe_defaults.json"


class Before(Section):
    side: int
    held_out: bool = False


class After(Before):
    tiles: int = 1


for module in pkgutil.iter_modules(schemas.__path__):
    importlib.import_module(f"schemas.{module.name}")


def sections(of: type[Section]) -> Iterator[type[Section]]:
    for section in of.__subclasses__():
        if section.__module__.startswith("schemas."):
            yield section
            yield from sections(section)


def defaults() -> dict[str, Any]:
    fields = {
        f"{section.__name__}.{name}": to_jsonable_python(field.get_default(call_default_factory=True))
        for section in sections(Section)
        for name, field in section.model_fields.items()
        if not field.is_required()
    }
    return dict(sorted(fields.items()))


def test_a_new_field_renames_nothing_until_it_is_used() -> None:
    before = section_digest(Before(side=2))
    assert section_digest(After(side=2)) == section_digest(After(side=2, tiles=1)) == before
    others = [After(side=2, tiles=3), After(side=3), After(side=2, held_out=True)]
    assert len({before, *map(section_digest, others)}) == 4
    assert section_digest(others[0], exclude={"tiles"}) == before


def test_defaults_are_what_they_were() -> None:
    said = json.loads(DEFAULTS.read_text())
    found = defaults()
    changed = {name: (value, found.get(name)) for name, value in said.items() if found.get(name) != value}
    assert not changed, "digests leave defaults out, so one never changes: give the field another name"
    assert found == said, f"new fields: add them to {DEFAULTS.name}"
