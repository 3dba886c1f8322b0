"""Figures from predictions: each with its 95 % interval, its blind baseline, and the paired difference to it.

Every figure resamples scenes, so that several pictures or questions about one room do not count as independent.

Shape legend: B batch, N depth tokens, S the codebook's image side, H, W image height and width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from perceptio.data.images import decode_depth16
from perceptio.data.masks import rle_to_mask
from perceptio.metrics.choices import is_right, read_choice
from perceptio.metrics.depth import DepthErrors, align, inverse_errors, z_errors
from perceptio.metrics.intervals import Sums, interval, paired_difference, sums
from perceptio.metrics.masks import Bools, iou, overlap, union_mask
from workflows.held_out import Blind, Picture, Row, inv_depth, resized

Predictions = Mapping[tuple[str, int], Row]  # (picture, turn) -> a row of PREDICTIONS
Maps = npt.NDArray[np.float32]
Decode = Callable[[npt.NDArray[np.int64]], Maps]  # codes [B, N] -> inv_depth [B, S, S]
NO_BASELINE = "none"  # what a figure is against that stands alone
BOX = 0.25  # half the side of the central box, as a share of the image


@dataclass(frozen=True)
class Metric:
    """A figure over `n` scenes with its 95 % interval; `difference` is value - baseline, paired, with its interval."""

    value: float
    low: float
    high: float
    n: int
    baseline: float
    against: str  # what the baseline is
    difference: float
    difference_low: float
    difference_high: float
    higher_is_better: bool


class Score:
    """Collects metrics under one bootstrap."""

    def __init__(self, resamples: int, seed: int) -> None:
        self.draw = {"resamples": resamples, "seed": seed}
        self.metrics: dict[str, Metric] = {}
        self.marks: dict[str, Sums] = {}

    def add(self, name: str, own: Sums, baseline: Sums, against: str, *, higher_is_better: bool) -> None:
        """Adds a figure beside its baseline; both over the same scenes."""
        found, paired = interval(own, **self.draw), paired_difference(own, baseline, **self.draw)
        self.marks[name] = own
        self.metrics[name] = Metric(
            value=found.value,
            low=found.low,
            high=found.high,
            n=found.n,
            baseline=baseline.value,
            against=against,
            difference=paired.value,
            difference_low=paired.low,
            difference_high=paired.high,
            higher_is_better=higher_is_better,
        )


def score(
    pictures: Sequence[Picture],
    said: Mapping[str, Predictions],
    blind: Blind,
    decode: Decode,
    *,
    resamples: int,
    seed: int,
) -> Score:
    """Every figure that the predictions of the passes allow, by name; kinds that were not asked are left out."""
    found = Score(resamples, seed)
    _depth(found, pictures, said["model"], blind, decode)
    _referring(found, pictures, said["model"], said["untrained"], blind)
    _points(found, pictures, said["model"], said["blank"])
    _points_on_maps(found, pictures, said["model"], len(blind.top_codes_N), decode)
    _questions(found, pictures, said["model"], said["blank"], blind)
    _well_formed(found, pictures, said["free"], said["untrained_free"])
    return found


def _depth(found: Score, pictures: Sequence[Picture], said: Predictions, blind: Blind, decode: Decode) -> None:
    """Maps at the codebook's size against the teacher's, one picture a scene; then in z where true depth is known."""
    tokens = len(blind.top_codes_N)
    replies: dict[str, tuple[Picture, Row]] = {}
    for picture in pictures:
        row = _first(picture, said)
        if row is not None and len(row["codes"]) == tokens:
            replies.setdefault(picture.scene, (picture, row))
    if not replies:
        return
    scenes, pairs = list(replies), list(replies.values())
    codes_BN = np.array([row["codes"] for _, row in pairs], np.int64)
    true_BN = np.array([picture.codes for picture, _ in pairs], np.int64)
    generated, rebuilt = decode(codes_BN), decode(true_BN)
    targets = [inv_depth(picture.depth_target) for picture, _ in pairs]

    def mae(maps: Sequence[npt.NDArray[Any]] | Maps) -> Sums:
        return sums(scenes, [inverse_errors(m, target).mae for m, target in zip(maps, targets, strict=True)])

    mean = [blind.mean_map_SS] * len(scenes)
    ceiling, own, flat = mae(rebuilt), mae(generated), mae(mean)
    # the next scene's codes: every map is used once, and none for its own scene where there are two or more
    other = mae(np.roll(rebuilt, 1, axis=0))
    found.add("reconstruction_mae", ceiling, flat, "mean training map", higher_is_better=False)
    found.add("generated_depth_mae", own, flat, "mean training map", higher_is_better=False)
    found.add("generated_depth_mae_vs_other_image", own, other, "another image's codes", higher_is_better=False)
    found.add("generated_depth_mae_vs_reconstruction", own, ceiling, "codebook (ceiling)", higher_is_better=False)
    right, usual = (codes_BN == true_BN).mean(1), (blind.top_codes_N == true_BN).mean(1)
    found.add("code_accuracy", sums(scenes, right), sums(scenes, usual), "usual codes", higher_is_better=True)
    _true_depth(found, scenes, [picture for picture, _ in pairs], generated, blind)


def _true_depth(
    found: Score, scenes: Sequence[str], pictures: Sequence[Picture], generated: Maps, blind: Blind
) -> None:
    """AbsRel, RMSE (metres) and delta1 in z of teacher and generated maps, beside the mean map, all aligned alike."""
    kept = [i for i, picture in enumerate(pictures) if picture.recorded_depth is not None]
    if not kept:
        return
    errors: dict[str, list[DepthErrors]] = {"teacher": [], "generated": [], "mean": []}
    for i in kept:
        picture, recorded = pictures[i], pictures[i].recorded_depth
        assert recorded is not None
        z_HW = decode_depth16(recorded) / 1000
        maps = {
            "teacher": inv_depth(picture.inv_depth),
            "generated": resized(generated[i], picture.size),
            "mean": resized(blind.mean_map_SS, picture.size),
        }
        for name, map_HW in maps.items():
            errors[name].append(z_errors(align(np.clip(map_HW, 0, 1), z_HW), z_HW))
    names = [scenes[i] for i in kept]
    for field in ("abs_rel", "rmse", "delta1"):
        figure = {name: sums(names, [getattr(e, field) for e in values]) for name, values in errors.items()}
        for name in ("teacher", "generated"):
            better = field == "delta1"
            found.add(f"{name}_{field}", figure[name], figure["mean"], "mean training map", higher_is_better=better)


def _referring(
    found: Score, pictures: Sequence[Picture], said: Predictions, untrained: Predictions, blind: Blind
) -> None:
    asked = _asked(pictures, said, "referring")
    if not asked:
        return
    scenes = [picture.scene for picture, _ in asked]
    guesses = {name: _Overlaps(scenes) for name in ("model", "untrained", *_blind_masks(*asked[0], blind))}
    for picture, turn in asked:
        true_HW = picture.true_mask(turn)
        masks = _blind_masks(picture, turn, blind)
        masks["model"] = _said_mask(picture, said[picture.id, turn])
        if untrained:
            masks["untrained"] = _said_mask(picture, untrained[picture.id, turn])
        for name, mask_HW in masks.items():
            guesses[name].add(mask_HW, true_HW)
    own, start = guesses.pop("model"), guesses.pop("untrained")
    for name, figure in (("referring_ciou", _Overlaps.ciou), ("referring_giou", _Overlaps.giou)):
        best = max(guesses, key=lambda guess: figure(guesses[guess]).value)
        found.add(name, figure(own), figure(guesses[best]), f"{best}, the best blind mask", higher_is_better=True)
    if untrained:
        found.add("referring_ciou_vs_untrained", own.ciou(), start.ciou(), "untrained start", higher_is_better=True)


class _Overlaps:
    """Intersections and unions of one kind of mask over all queries."""

    def __init__(self, scenes: Sequence[str]) -> None:
        self.scenes = scenes
        self.counts: list[tuple[int, int]] = []

    def add(self, found_HW: Bools, true_HW: Bools) -> None:
        self.counts.append(overlap(found_HW, true_HW))

    def ciou(self) -> Sums:
        return sums(self.scenes, *zip(*self.counts, strict=True))

    def giou(self) -> Sums:
        return sums(self.scenes, iou(*zip(*self.counts, strict=True)))


def _said_mask(picture: Picture, row: Row) -> Bools:
    return union_mask([rle_to_mask(rle) for rle in row["masks"]], picture.size)


def _blind_masks(picture: Picture, turn: int, blind: Blind) -> dict[str, Bools]:
    """Masks that do without the words: whole objects are the truth's own, so these two are hard to beat."""
    height, width = picture.size
    y, x = np.mgrid[:height, :width]
    out_HW = np.maximum(np.abs((y + 0.5) / height - 0.5), np.abs((x + 0.5) / width - 0.5))
    found: dict[str, Bools] = {"central box": out_HW < BOX}
    if blind.mean_mask_GG is not None:
        found["mean training mask"] = resized(blind.mean_mask_GG, picture.size)
    masks = [mask_HW for rle in picture.masks if (mask_HW := rle_to_mask(rle)).any()]
    if masks:
        found["largest object"] = max(masks, key=lambda mask_HW: int(mask_HW.sum()))
        found["most central object"] = min(masks, key=lambda m: np.hypot(*(np.argwhere(m).mean(0) / m.shape - 0.5)))
    return found


def _points(found: Score, pictures: Sequence[Picture], said: Predictions, blank: Predictions) -> None:
    """The mean of the accuracies over sets of 3, 4, 5 ... points, and each apart; chance is 1 / points.

    The lowest point in the picture is often the closest in photographs (METHOD.md), so that guess is scored too.
    """
    asked = _asked(pictures, said, "points")
    if not asked:
        return
    sizes = sorted({len(picture.turns[i]["choices"]) for picture, i in asked})
    parts = {"": asked}
    parts |= {f"_{n}": [(p, i) for p, i in asked if len(p.turns[i]["choices"]) == n] for n in sizes}
    for suffix, part in parts.items():
        own = _mean_of_sets(part, [_right(*ask, said) for ask in part])
        found.add(f"closest_point_accuracy{suffix}", own, _chance(part), "chance", higher_is_better=True)
        if not suffix:
            _beside_unseen(found, "closest_point_accuracy", part, said, blank)
            named = _mean_of_sets(part, [_is_readable(*ask, said) for ask in part])
            found.add("closest_point_readable", named, _nothing(named), NO_BASELINE, higher_is_better=True)
            if all(picture.turns[i]["points"] for picture, i in part):
                lowest = _mean_of_sets(part, [_is_lowest(picture.turns[i]) for picture, i in part])
                found.add("closest_point_accuracy_vs_lowest", own, lowest, "lowest point", higher_is_better=True)


def _points_on_maps(found: Score, pictures: Sequence[Picture], said: Predictions, tokens: int, decode: Decode) -> None:
    """Which point is the closest on the map that the depth tokens stand for: what they know, whatever the words say.

    Beside chance; and the same read off the codebook's reconstruction, which is its ceiling.
    """
    asked = [
        (picture, i)
        for picture, i in _asked(pictures, said, "points")
        if picture.turns[i]["points"] and len(said[picture.id, i]["codes"]) == tokens
    ]
    if not asked:
        return
    chance = _chance(asked)
    for name, codes in (
        ("generated_map", [said[picture.id, i]["codes"] for picture, i in asked]),
        ("reconstruction", [picture.codes for picture, _ in asked]),
    ):
        maps = decode(np.array(codes, np.int64))
        right = [_is_closest(map_SS, picture, i) for map_SS, (picture, i) in zip(maps, asked, strict=True)]
        found.add(f"closest_point_on_{name}", _mean_of_sets(asked, right), chance, "chance", higher_is_better=True)


def _mean_of_sets(asked: Sequence[tuple[Picture, int]], right: npt.ArrayLike) -> Sums:
    """The mean of the accuracies over the sizes of sets of points, each size counting the same."""
    points = [len(picture.turns[i]["choices"]) for picture, i in asked]
    sizes = Counter(points)
    weights = 1 / np.array([sizes[n] for n in points])  # so that a ratio of sums is the mean of the subsets
    return sums([picture.scene for picture, _ in asked], weights * np.asarray(right, np.float64), weights)


def _chance(asked: Sequence[tuple[Picture, int]]) -> Sums:
    return _mean_of_sets(asked, [1 / len(picture.turns[i]["choices"]) for picture, i in asked])


def _is_closest(map_SS: npt.NDArray[Any], picture: Picture, turn: int) -> bool:
    """Whether the point with the largest inverse depth on a map is the answer."""
    map_HW, asked = resized(map_SS, picture.size), picture.turns[turn]
    values = [map_HW[int(point["y"]), int(point["x"])] for point in asked["points"]]
    return is_right(asked["choices"][int(np.argmax(values))], asked["answer"], asked["choices"])


def _is_lowest(turn: Row) -> bool:
    """Whether the answer of a points question is the point that lies lowest in the picture."""
    lowest = max(range(len(turn["points"])), key=lambda i: turn["points"][i]["y"])
    return is_right(turn["choices"][lowest], turn["answer"], turn["choices"])


def _questions(found: Score, pictures: Sequence[Picture], said: Predictions, blank: Predictions, blind: Blind) -> None:
    """Accuracy of each kind of question beside its usual answer, and beside the model that does not see."""
    for kind in sorted({turn["kind"] for picture in pictures for turn in picture.turns} - {"referring", "points"}):
        asked = _asked(pictures, said, kind)
        if not asked:
            continue
        scenes = [picture.scene for picture, _ in asked]
        own = sums(scenes, [_right(picture, i, said) for picture, i in asked])
        usual = sums(scenes, [blind.answer(p.turns[i]) == p.turns[i]["answer"] for p, i in asked])
        found.add(f"{kind}_accuracy", own, usual, "usual training answer", higher_is_better=True)
        _beside_unseen(found, f"{kind}_accuracy", asked, said, blank)
        with_choices = [(picture, i) for picture, i in asked if picture.turns[i]["choices"]]
        if with_choices:
            named = sums([p.scene for p, _ in with_choices], [_is_readable(*ask, said) for ask in with_choices])
            found.add(f"{kind}_readable", named, _nothing(named), NO_BASELINE, higher_is_better=True)


def _beside_unseen(
    found: Score, name: str, asked: list[tuple[Picture, int]], said: Predictions, blank: Predictions
) -> None:
    """Plain accuracy over the questions that were asked without the image too, beside the answers given then."""
    both = [(picture, i) for picture, i in asked if (picture.id, i) in blank]
    if both:
        scenes = [picture.scene for picture, _ in both]
        own, unseen = (sums(scenes, [_right(picture, i, answers) for picture, i in both]) for answers in (said, blank))
        found.add(f"{name}_vs_image_removed", own, unseen, "image removed", higher_is_better=True)


def _is_readable(picture: Picture, turn: int, said: Predictions) -> bool:
    """Whether a reply names one of the choices, right or wrong: else it is no answer at all."""
    return read_choice(said[picture.id, turn]["text"], picture.turns[turn]["choices"]) is not None


def _nothing(own: Sums) -> Sums:
    return Sums(np.zeros(len(own)), own.denominator_I, own.images)


def _well_formed(found: Score, pictures: Sequence[Picture], said: Predictions, untrained: Predictions) -> None:
    scene_of = {picture.id: picture.scene for picture in pictures}
    if not said:
        return
    scenes = [scene_of[key] for key, _ in said]
    own = sums(scenes, [row["well_formed"] for row in said.values()])
    start = sums(scenes, [untrained[key]["well_formed"] for key in said]) if untrained else _nothing(own)
    against = "untrained start" if untrained else NO_BASELINE
    found.add("well_formed_without_grammar", own, start, against, higher_is_better=True)


def _asked(pictures: Sequence[Picture], said: Predictions, kind: str) -> list[tuple[Picture, int]]:
    turns = [(p, i) for p in pictures for i, turn in enumerate(p.turns) if turn["kind"] == kind]
    return [(picture, i) for picture, i in turns if (picture.id, i) in said]


def _right(picture: Picture, turn: int, said: Predictions) -> float:
    asked = picture.turns[turn]
    return float(is_right(said[picture.id, turn]["text"], asked["answer"], asked["choices"]))


def _first(picture: Picture, said: Predictions) -> Row | None:
    turns = range(-1, len(picture.turns))
    return next((said[picture.id, i] for i in turns if (picture.id, i) in said), None)
