"""The study's statistics: every figure of every arm over its seeds, beside its blind baseline, and paired by scene.

A figure of an arm is that of all its seeds together: sums by scene, added over the seeds. Intervals hold 95 % and
resample scenes, the same ones for both sides of a comparison; what training again would change is seen between seeds,
and in no interval.

Shape legend: S scenes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from perceptio.metrics.intervals import Interval, Sums, interval, paired_difference
from schemas.study import StudyArm
from workflows.scores import NO_BASELINE

Run = Mapping[str, Any]  # a finished run's result, as `study` writes it
Runs = Mapping[str, Mapping[str, Run]]  # by arm, then by seed
Verdict = Literal["better", "worse", "open"]

KINDS = {
    "attribute": "What colour is it?",
    "choice": "Multiple choice",
    "count": "How many are there?",
    "distance": "Which of two is closer?",
    "yes_no": "Yes or no",
}
WORDS = tuple(f"{kind}_accuracy" for kind in KINDS)


@dataclass(frozen=True)
class Figure:
    """What is measured. Codes that are forced on a model say nothing of how well it writes or places its own."""

    title: str
    higher_is_better: bool = True
    of_forced: bool = True  # whether it is a finding about an arm with forced codes
    ceiling: str = ""  # the figure that it cannot pass


PRIMARY = {
    "referring_ciou": Figure("Referring segmentation, cIoU", of_forced=False),
    "closest_point_accuracy": Figure("Closest point, mean of 3, 4, 5 points"),
    "closest_point_on_generated_map": Figure(
        "Closest point, read off the generated map", of_forced=False, ceiling="closest_point_on_reconstruction"
    ),
    "generated_depth_mae": Figure("Generated map, error in inverse depth", False, False, "reconstruction_mae"),
    "well_formed_without_grammar": Figure("Well formed without the grammar", of_forced=False),
    "words": Figure("Other questions, all kinds together"),
}
OTHERS = {
    "closest_point_accuracy_3": Figure("Closest of 3 points"),
    "closest_point_accuracy_4": Figure("Closest of 4 points"),
    "closest_point_accuracy_5": Figure("Closest of 5 points"),
    "code_accuracy": Figure("Depth codes equal to the teacher's", of_forced=False),
    **{f"{kind}_accuracy": Figure(title) for kind, title in KINDS.items()},
}
FIGURES = PRIMARY | OTHERS


@dataclass(frozen=True)
class Value:
    """A figure of one arm over all its seeds."""

    value: float
    low: float
    high: float
    scenes: int
    questions: int  # of one seed
    seeds: dict[str, float]
    baseline: float | None  # None where nothing was asked that the figure could stand beside
    against: str
    verdicts: dict[str, Verdict]  # by seed, beside the baseline, paired; {} where there is none


@dataclass(frozen=True)
class Difference:
    """A figure of one arm less that of another, over the seeds that both have, paired by scene."""

    value: float
    low: float
    high: float
    seeds: dict[str, float]
    verdict: Verdict  # of the interval, and of every seed alone by its sign


def values(runs: Mapping[str, Run], draw: dict[str, int], *, forced: bool) -> dict[str, Value]:
    """By figure, from one arm's runs by seed; what says nothing about forced codes is left out."""
    found = {}
    for name, figure in FIGURES.items():
        having = {seed: run for seed, run in runs.items() if _has([run], name)}
        if not having or (forced and not figure.of_forced):
            continue
        marks, metrics = pooled(list(having.values()), name), [run["metrics"] for run in having.values()]
        all_seeds = interval(marks, **draw)
        baseline, against = _baseline(metrics[0], name)
        found[name] = Value(
            value=round(all_seeds.value, 4),
            low=round(all_seeds.low, 4),
            high=round(all_seeds.high, 4),
            scenes=all_seeds.n,
            questions=_questions(next(iter(having.values())), name),
            seeds={seed: round(pooled([run], name).value, 4) for seed, run in having.items()},
            baseline=None if baseline is None else round(baseline, 4),
            against=against,
            verdicts={} if baseline is None else _beside_blind(having, name),
        )
    return found


def differences(arm: StudyArm, by_arm: Runs, draw: dict[str, int]) -> dict[str, dict[str, Difference]]:
    """Of an arm, by the other arm's name, then by figure."""
    found: dict[str, dict[str, Difference]] = {}
    for other_name in arm.against:
        own, other = by_arm[arm.name], by_arm[other_name]
        found[other_name] = {}
        for name, figure in FIGURES.items():
            seeds = [s for s in own if s in other and _has([own[s]], name) and _has([other[s]], name)]
            if not seeds or (arm.codes != "own" and not figure.of_forced):
                continue
            apart = _apart([own[s] for s in seeds], [other[s] for s in seeds], name, draw)
            single = {s: _apart([own[s]], [other[s]], name, draw).value for s in seeds}
            signs = {np.sign(value) for value in single.values()}
            told = (apart.low > 0 or apart.high < 0) and signs == {np.sign(apart.value)}
            better = (apart.value > 0) == figure.higher_is_better
            found[other_name][name] = Difference(
                round(apart.value, 4),
                round(apart.low, 4),
                round(apart.high, 4),
                {seed: round(value, 4) for seed, value in single.items()},
                "open" if not told else "better" if better else "worse",
            )
    return found


def pooled(runs: Sequence[Run], name: str) -> Sums:
    """The sums of a figure by scene, added over runs; scenes without a question of its kind are left out."""
    total: defaultdict[str, np.ndarray[Any, Any]] = defaultdict(lambda: np.zeros(2))
    for run in runs:
        for part in _parts(name):
            for scene, *pair in zip(run["scenes"], *run["marks"].get(part, ((), ())), strict=False):
                total[scene] += pair
    scenes = [scene for scene in sorted(total) if total[scene][1] > 0]
    sums_S2 = np.array([total[scene] for scene in scenes])
    return Sums(sums_S2[:, 0], sums_S2[:, 1], tuple(scenes))


def replies(runs: Sequence[Run], kind: str) -> tuple[float, float, float] | None:
    """Shares of replies to a kind of question that are right, wrong, and no answer at all; None where unknown."""
    right, readable = (
        "closest_point_accuracy" if kind == "closest_point" else f"{kind}_accuracy",
        f"{kind}_readable",
    )
    if not (_has(runs, right) and _has(runs, readable)):
        return None
    share, said = pooled(runs, right).value, pooled(runs, readable).value
    return share, max(said - share, 0.0), 1 - said


def _has(runs: Sequence[Run], name: str) -> bool:
    return any(part in run["marks"] for run in runs for part in _parts(name))


def _parts(name: str) -> tuple[str, ...]:
    return WORDS if name == "words" else (name,)


def _baseline(metrics: Mapping[str, Any], name: str) -> tuple[float | None, str]:
    if name != "words":
        own = metrics[name]
        return (None if own["against"] == NO_BASELINE else own["baseline"]), own["against"]
    usual = [(metrics[kind]["baseline"], metrics[kind]["n"]) for kind in WORDS if kind in metrics]
    return sum(value * n for value, n in usual) / sum(n for _, n in usual), "usual training answer"


def _beside_blind(runs: Mapping[str, Run], name: str) -> dict[str, Verdict]:
    """By seed, as the evaluation itself paired it; {} for `words`, which no evaluation has."""
    found: dict[str, Verdict] = {}
    for seed, run in runs.items():
        metric = run["metrics"].get(name)
        if metric is not None:
            gain = (metric["difference_low"], metric["difference_high"])
            gain = gain if metric["higher_is_better"] else (-gain[1], -gain[0])
            found[seed] = "better" if gain[0] > 0 else "worse" if gain[1] < 0 else "open"
    return found


def _questions(run: Run, name: str) -> int:
    """How many were asked: weights are one a question, or one over the number of its size for points."""
    if name.startswith("closest_point"):
        sizes = [part for part in (f"closest_point_accuracy_{n}" for n in range(2, 27)) if part in run["marks"]]
        parts = [name] if name in sizes else sizes
        weights = [np.array(run["marks"][part][1]) for part in parts]
        return sum(round(w.sum() / w[w > 0].min()) for w in weights)
    if name in ("words", *WORDS):
        return round(sum(sum(run["marks"][part][1]) for part in _parts(name) if part in run["marks"]))
    return sum(weight > 0 for weight in run["marks"][name][1])


def _apart(own: Sequence[Run], other: Sequence[Run], name: str, draw: dict[str, int]) -> Interval:
    first, second = _shared(pooled(own, name), pooled(other, name))
    return paired_difference(first, second, **draw)


def _shared(a: Sums, b: Sums) -> tuple[Sums, Sums]:
    """Both over the scenes that both have."""
    scenes = sorted({*a.images} & {*b.images}, key=str)

    def part(of: Sums) -> Sums:
        place = {scene: i for i, scene in enumerate(of.images)}
        at = [place[scene] for scene in scenes]
        return Sums(of.numerator_I[at], of.denominator_I[at], tuple(scenes))

    return part(a), part(b)
