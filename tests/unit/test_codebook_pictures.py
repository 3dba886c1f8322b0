"""The contact sheet shows the maps it says it shows."""

import numpy as np
import pytest

from workflows.codebook_pictures import FULL, GAP, LINE, Rebuilt, choose, contact_sheet
from workflows.pictures import depth_colours


def test_best_median_and_worst_are_chosen_by_error_then_name() -> None:
    errors = [(0.1 * (n % 20), f"map-{n:02}") for n in range(40)]
    chosen = choose(errors)
    assert chosen["best"] == ["map-00", "map-20", "map-01", "map-21"]
    assert chosen["median"] == ["map-09", "map-29", "map-10", "map-30"]
    assert chosen["worst"] == ["map-18", "map-38", "map-19", "map-39"]
    assert choose(errors[::-1]) == chosen


@pytest.mark.parametrize(("maps", "each"), [(1, 1), (5, 1), (11, 3), (12, 4)])
def test_few_maps_give_few_rows(maps: int, each: int) -> None:
    chosen = choose([(float(n), str(n)) for n in range(maps)])
    assert [len(names) for names in chosen.values()] == [each] * 3
    assert chosen["best"][0] == "0" and chosen["worst"][-1] == str(maps - 1)


def test_the_sheet_has_teacher_reconstruction_and_error_side_by_side() -> None:
    truth = np.full((64, 64), 0.5, np.float32)
    rows = [Rebuilt("rooms/a", FULL / 2, truth, truth + np.float32(FULL / 2))]
    sheet = np.asarray(contact_sheet({"best": rows, "worst": rows}))
    top, side = GAP + 2 * LINE, 128  # maps of 64 pixels are shown twice as large
    for left in (GAP, GAP + 3 * (side + GAP) + GAP):
        tiles = [sheet[top : top + side, left + k * (side + GAP) :][:, :side] for k in range(3)]
        for tile, value in zip(tiles, (0.5, 0.5 + FULL / 2, 0.5), strict=True):
            assert (tile == depth_colours(np.full((1, 1), value))).all()
