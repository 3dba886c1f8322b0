"""Log lines as JSON: one object a line, whatever is logged."""

from __future__ import annotations

import json
import logging

from workflows.logs import JsonLines


def line(message: str, *values: object, **more: object) -> dict[str, object]:
    record = logging.getLogger("workflows.depth").makeRecord(
        "workflows.depth", logging.INFO, __file__, 1, message, values, None, extra=more or None
    )
    text = JsonLines().format(record)
    assert "\n" not in text
    found: dict[str, object] = json.loads(text)
    return found


def test_a_line_says_when_who_and_what() -> None:
    found = line("%s: %d rows", "depth", 7)
    assert (found["level"], found["logger"], found["message"]) == ("info", "workflows.depth", "depth: 7 rows")
    assert str(found["time"]).endswith("+00:00")


def test_fields_stand_by_their_names_and_odd_values_as_text() -> None:
    found = line("progress\nof a stage", stage="depth", rows=3, where=object)
    assert (found["stage"], found["rows"]) == ("depth", 3) and "object" in str(found["where"])


def test_an_exception_is_part_of_the_line() -> None:
    try:
        raise ValueError("broken")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.getLogger("x").makeRecord("x", logging.ERROR, __file__, 1, "failed", (), info)
    found = json.loads(JsonLines().format(record))
    assert found["level"] == "error" and "ValueError: broken" in found["exception"]
