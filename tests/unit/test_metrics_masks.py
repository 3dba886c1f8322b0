"""cIoU and gIoU by hand, and what must hold for any masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from perceptio.metrics.masks import ciou, giou, iou, overlap, union_mask

MASKS = hnp.arrays(np.bool_, (4, 5))


def mask(*rows: str) -> np.ndarray:
    return np.array([[letter == "#" for letter in row] for row in rows])


def test_ciou_weighs_by_area_and_giou_by_query() -> None:
    small = overlap(mask("#.", ".."), mask("##", ".."))  # 1 of 2
    large = overlap(mask("##", "##"), mask("##", "##"))  # 4 of 4
    intersections, unions = zip(small, large, strict=True)
    assert (small, large) == ((1, 2), (4, 4))
    assert ciou(intersections, unions) == pytest.approx(5 / 6)
    assert giou(intersections, unions) == pytest.approx((0.5 + 1) / 2)


def test_several_masks_are_one_and_none_is_empty() -> None:
    assert union_mask([mask("#.", ".."), mask(".#", "..")], (2, 2)).tolist() == mask("##", "..").tolist()
    assert not union_mask([], (2, 2)).any()
    assert overlap(union_mask([], (2, 2)), mask("##", "..")) == (0, 2)


def test_both_empty_is_right_for_giou_and_refused_for_ciou() -> None:
    assert iou([0], [0]).tolist() == [1.0]
    with pytest.raises(ValueError, match="sum of unions is 0"):
        ciou([0], [0])


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(1, 2\)"):
        overlap(mask("##", "##"), mask("##"))
    with pytest.raises(ValueError, match="resize"):
        union_mask([mask("##")], (2, 2))


@settings(max_examples=50, deadline=None)
@given(MASKS, MASKS)
def test_overlap_is_symmetric_and_bounded(a: np.ndarray, b: np.ndarray) -> None:
    intersection, union = overlap(a, b)
    assert overlap(b, a) == (intersection, union)
    assert intersection + union == a.sum() + b.sum()
    assert 0 <= iou([intersection], [union])[0] <= 1
    assert (iou([intersection], [union])[0] == 1) == bool((a == b).all())
