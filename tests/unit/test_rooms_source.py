"""Rooms as a source: every room gives its pictures, or a refusal that says which room it was."""

from __future__ import annotations

from typing import Any

import pytest

from perceptio.sources.record import Found, Refused
from schemas.recipe import RoomsSource
from schemas.tables import Reason
from workflows import rooms_source
from workflows.rooms_source import RoomsReader

SOURCE = {"name": "rooms", "format": "rooms", "count": 3, "size": 32, "seed": 1, "questions": [], "exact_masks": True}


def test_a_room_that_cannot_be_laid_out_is_refused_and_the_others_are_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    render = rooms_source.render_room

    def failing(seed: int, index: int, size: int) -> Any:
        if index == 1:
            raise RuntimeError("no place for the sofa")
        return render(seed, index, size)

    monkeypatch.setattr(rooms_source, "render_room", failing)
    reader = RoomsReader(RoomsSource.model_validate(SOURCE))
    first, second, third = ([*reader.read(item)] for item in reader.items())
    assert all(isinstance(row, Found) for row in (*first, *third)) and first and third
    assert second == [Refused(Reason.BAD_RECORD, "no place for the sofa", "rooms://seed/1/index/1?size=32")]
