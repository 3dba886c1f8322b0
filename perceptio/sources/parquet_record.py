"""What a Parquet row says of its image, by the recipe's map of columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from perceptio.data.masks import Rle
from perceptio.sources.maps import mask_of, upright_size
from perceptio.sources.record import RowError, shown
from perceptio.sources.referring import plain_expression, referring_turn
from schemas.sources import ParquetColumns, ParquetSource
from schemas.tables import Reason

Values = dict[str, Any]
ReadFile = Callable[[Any, str], bytes]


def record_values(row: Values, source: ParquetSource, image: bytes, read_file: ReadFile) -> Values:
    """The fields of the row's record, not yet checked. Raises RowError for columns that do not go together."""
    columns = source.columns
    masks = [] if columns.mask is None else _masks(row[columns.mask], columns.mask, image, read_file)
    boxes = [] if columns.box is None else _boxes(row[columns.box], columns)
    turns = [*_questions(row, columns, source.kind), *_expressions(row, columns, max(len(masks), len(boxes)))]
    return {"turns": turns, "boxes": boxes, "masks": masks}


def _questions(row: Values, columns: ParquetColumns, kind: str) -> list[Values]:
    if columns.question is None or columns.answer is None:
        return []
    questions = _texts(row[columns.question], columns.question)
    answers = _texts(row[columns.answer], columns.answer)
    if len(questions) != len(answers):
        message = f"'{columns.question}' has {len(questions)} texts, '{columns.answer}' {len(answers)}: one answer each"
        raise RowError(Reason.BAD_RECORD, message)
    return [{"kind": kind, "prompt": q, "answer": a} for q, a in zip(questions, answers, strict=True)]


def _expressions(row: Values, columns: ParquetColumns, objects: int) -> list[Values]:
    if columns.expression is None:
        return []
    texts = [plain_expression(text) for text in _texts(row[columns.expression], columns.expression)]
    if objects not in (0, 1, len(texts)):
        message = f"'{columns.expression}' has {len(texts)} texts for {objects} objects: give one object, or one each"
        raise RowError(Reason.BAD_RECORD, message)
    if objects == 1:
        return [referring_turn(text, [0]) for text in texts]
    return [referring_turn(text, [i] if objects else []) for i, text in enumerate(texts)]


def _texts(value: Any, column: str) -> list[str]:
    """The texts of a string or a list of strings; none for null."""
    texts = value if isinstance(value, list) else [] if value is None else [value]
    wrong = next((text for text in texts if not isinstance(text, str) or not text.strip()), None)
    if wrong is not None or None in texts:
        raise RowError(Reason.BAD_RECORD, f"column '{column}' holds {shown(wrong)}, expected texts that are not empty")
    return texts


def _masks(value: Any, column: str, image: bytes, read_file: ReadFile) -> list[Rle]:
    masks = value if isinstance(value, list) else [] if value is None else [value]
    return [_mask(mask, f"column '{column}', mask {i}", image, read_file) for i, mask in enumerate(masks)]


def _mask(mask: Any, where: str, image: bytes, read_file: ReadFile) -> Rle:
    if not isinstance(mask, dict) or "counts" not in mask:
        size = upright_size(image, may_turn=True)
        if size is None:
            raise RowError(Reason.NOT_AN_IMAGE, "the image cannot be opened, so no mask can be laid on it")
        return mask_of(read_file(mask, where), size)
    counts = mask["counts"]
    if isinstance(counts, bytes) and counts.isascii():
        counts = counts.decode("ascii")
    sides = mask.get("size", [mask.get("height"), mask.get("width")])
    if not isinstance(counts, str) or not isinstance(sides, list) or len(sides) != 2:
        message = f"{where}: counts are {shown(counts)}, size is {shown(sides)}: expected COCO's compressed run lengths"
        raise RowError(Reason.BAD_MASK, message)
    return {"height": sides[0], "width": sides[1], "counts": counts}


def _boxes(value: Any, columns: ParquetColumns) -> list[Sequence[float]]:
    if not value:
        return []
    boxes = value if isinstance(value, list) and isinstance(value[0], list) else [value]
    return [_box(box, columns) for box in boxes]


def _box(box: Any, columns: ParquetColumns) -> Sequence[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
        raise RowError(Reason.BAD_RECORD, f"column '{columns.box}' holds {shown(box)}, expected 4 numbers a box")
    x, y, right, bottom = box
    return box if columns.box_form == "xyxy" else [x, y, x + right, y + bottom]
