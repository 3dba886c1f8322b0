"""What the study found, as a page and as JSON: every arm beside its blind baseline, and paired with the arm before it.

A figure of an arm is that of all its seeds together: sums by scene, added over the seeds. Intervals hold 95 % and
resample scenes, the same ones for both sides of a comparison; what training again would change is seen in the dots,
one a seed, and in no interval.

Shape legend: S scenes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from perceptio.metrics.intervals import Sums, interval, paired_difference
from schemas.recipe import Recipe, StudyArm
from workflows.charts import SPAN
from workflows.page import render
from workflows.store import Root

WORDS = ("attribute_accuracy", "choice_accuracy", "count_accuracy", "distance_accuracy", "yes_no_accuracy")
FIGURES = {  # name -> title, whether higher is better
    "referring_ciou": ("Referring segmentation, cIoU", True),
    "closest_point_accuracy": ("Closest point, mean of 3, 4, 5 points", True),
    "closest_point_accuracy_3": ("Closest of 3 points", True),
    "closest_point_accuracy_4": ("Closest of 4 points", True),
    "closest_point_accuracy_5": ("Closest of 5 points", True),
    "closest_point_on_generated_map": ("Closest point, read off the generated map", True),
    "generated_depth_mae": ("Generated map, error in inverse depth", False),
    "code_accuracy": ("Depth codes equal to the teacher's", True),
    "well_formed_without_grammar": ("Replies well formed without the grammar", True),
    "words": ("Other questions, all kinds together", True),
    "attribute_accuracy": ("What colour is it?", True),
    "choice_accuracy": ("Multiple choice", True),
    "count_accuracy": ("How many are there?", True),
    "distance_accuracy": ("Which of two is closer?", True),
    "yes_no_accuracy": ("Yes or no", True),
}
BESIDE = {  # a figure's ceiling
    "generated_depth_mae": "reconstruction_mae",
    "closest_point_on_generated_map": "closest_point_on_reconstruction",
}
SAID = ("arm", "seed", "code", "machine", "precision", "seconds")  # of a run
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Value:
    """A figure of one arm over all its seeds."""

    value: float
    low: float
    high: float
    scenes: int
    questions: int | None  # of one seed; None where the figure is no share of right answers
    seeds: dict[str, float]
    baseline: float | None  # None where nothing was asked that the figure could stand beside
    against: str


@dataclass(frozen=True)
class Difference:
    """A figure of one arm less that of another, over the seeds that both have, paired by scene."""

    value: float
    low: float
    high: float
    seeds: list[str]

    @property
    def told(self) -> bool:
        return self.low > 0 or self.high < 0


def write(recipe: Recipe, finished: Root, runs: Sequence[Run]) -> str:
    """Writes study.json and study.html beside the runs; where the page lies."""
    assert recipe.study is not None
    by_arm = {arm.name: {str(r["seed"]): r for r in runs if r["arm"] == arm.name} for arm in recipe.study.arms}
    draw = {"resamples": recipe.evaluate.bootstrap, "seed": recipe.seed}
    values = {arm.name: _values(by_arm[arm.name], draw) for arm in recipe.study.arms}
    differences = {arm.name: _differences(arm, by_arm, draw) for arm in recipe.study.arms}
    ceilings = {figure: _sums(list(runs), name).value for figure, name in BESIDE.items() if _has(runs, name)}
    summary = {
        "recipe": recipe.name,
        "command": f"perceptio study --recipe {recipe.name}",
        "arms": [arm.model_dump() for arm in recipe.study.arms],
        "values": {arm: {f: asdict(v) for f, v in found.items()} for arm, found in values.items()},
        "differences": {
            arm: {other: {f: asdict(d) for f, d in found.items()} for other, found in against.items()}
            for arm, against in differences.items()
        },
        "ceilings": ceilings,
        "runs": [{key: run[key] for key in SAID} | {"codebook": run["inputs"]["codebook"][:8]} for run in runs],
    }
    finished.write(json.dumps(summary, indent=1).encode() + b"\n", "study.json")
    page = render(
        "study.html.j2",
        recipe=recipe,
        arms=recipe.study.arms,
        titles={arm.name: arm.title for arm in recipe.study.arms},
        charts=[_chart(figure, recipe.study.arms, values, ceilings) for figure in FIGURES if _shown(figure, values)],
        comparisons=_comparisons(recipe.study.arms, differences),
        runs=summary["runs"],
        command=summary["command"],
    )
    finished.write(page.encode(), "study.html")
    return finished.at("study.html")


def _values(runs: Mapping[str, Run], draw: dict[str, int]) -> dict[str, Value]:
    found = {}
    for figure in FIGURES:
        having = {seed: run for seed, run in runs.items() if _has([run], figure)}
        if not having:
            continue
        marks, metrics = _sums(list(having.values()), figure), next(iter(having.values()))["metrics"]
        all_seeds = interval(marks, **draw)
        found[figure] = Value(
            value=round(all_seeds.value, 4),
            low=round(all_seeds.low, 4),
            high=round(all_seeds.high, 4),
            scenes=all_seeds.n,
            questions=round(marks.denominator_I.sum() / len(having)) if figure in ("words", *WORDS) else None,
            seeds={seed: round(_sums([run], figure).value, 4) for seed, run in having.items()},
            **_baseline(metrics, figure, marks),
        )
    return found


def _baseline(metrics: Mapping[str, Any], figure: str, marks: Sums) -> dict[str, Any]:
    if figure != "words":
        own = metrics[figure]
        return {"baseline": None if own["against"] == "none" else round(own["baseline"], 4), "against": own["against"]}
    usual = [(metrics[kind]["baseline"], metrics[kind]["n"]) for kind in WORDS if kind in metrics]
    share = sum(value * n for value, n in usual) / sum(n for _, n in usual)
    return {"baseline": round(share, 4), "against": "usual training answer"}


def _differences(
    arm: StudyArm, by_arm: Mapping[str, Mapping[str, Run]], draw: dict[str, int]
) -> dict[str, dict[str, Difference]]:
    """By the other arm's name, then by figure."""
    found: dict[str, dict[str, Difference]] = {}
    for name in arm.against:
        own, other = by_arm[arm.name], by_arm[name]
        found[name] = {}
        for figure in FIGURES:
            seeds = [s for s in own if s in other and _has([own[s]], figure) and _has([other[s]], figure)]
            if not seeds:
                continue
            first, second = _shared(*(_sums([runs[seed] for seed in seeds], figure) for runs in (own, other)))
            apart = paired_difference(first, second, **draw)
            found[name][figure] = Difference(round(apart.value, 4), round(apart.low, 4), round(apart.high, 4), seeds)
    return found


def _has(runs: Sequence[Run], figure: str) -> bool:
    return any(name in run["marks"] for run in runs for name in (WORDS if figure == "words" else (figure,)))


def _sums(runs: Sequence[Run], figure: str) -> Sums:
    """The sums of a figure by scene, added over runs; scenes without a question of its kind are left out."""
    total: defaultdict[str, np.ndarray[Any, Any]] = defaultdict(lambda: np.zeros(2))
    for run in runs:
        for name in WORDS if figure == "words" else (figure,):
            for scene, *pair in zip(run["scenes"], *run["marks"].get(name, ((), ())), strict=False):
                total[scene] += pair
    scenes = [scene for scene in sorted(total) if total[scene][1] > 0]
    sums_S2 = np.array([total[scene] for scene in scenes])
    return Sums(sums_S2[:, 0], sums_S2[:, 1], tuple(scenes))


def _shared(a: Sums, b: Sums) -> tuple[Sums, Sums]:
    """Both over the scenes that both have."""
    scenes = sorted({*a.images} & {*b.images}, key=str)

    def part(of: Sums) -> Sums:
        place = {scene: i for i, scene in enumerate(of.images)}
        at = [place[scene] for scene in scenes]
        return Sums(of.numerator_I[at], of.denominator_I[at], tuple(scenes))

    return part(a), part(b)


def _shown(figure: str, values: Mapping[str, Mapping[str, Value]]) -> bool:
    return any(figure in found for found in values.values())


def _chart(
    figure: str,
    arms: Sequence[StudyArm],
    values: Mapping[str, Mapping[str, Value]],
    ceilings: Mapping[str, float],
) -> dict[str, Any]:
    """One figure of every arm as a row of dots: all seeds with their interval, single seeds, baseline, ceiling."""
    own = {arm: found[figure] for arm, found in values.items() if figure in found}
    marks = [x for v in own.values() for x in (v.low, v.high, *v.seeds.values())]
    marks += [v.baseline for v in own.values() if v.baseline is not None]
    marks += [ceilings[figure]] if figure in ceilings else []
    low, high = min(marks), max(marks)
    margin = 0.05 * max(high - low, 1e-3)

    def x(value: float) -> float:
        return round(2 * SPAN * (value - low + margin) / (high - low + 2 * margin), 1)

    title, higher = FIGURES[figure]
    rows = [
        {
            "title": arm.title,
            "value": _number(v.value),
            "interval": f"{_number(v.low)} to {_number(v.high)}",
            "x": x(v.value),
            "low": x(v.low),
            "high": x(v.high),
            "seeds": [x(value) for value in v.seeds.values()],
            "said": ", ".join(f"seed {seed}: {_number(value)}" for seed, value in v.seeds.items()),
            "baseline": None if v.baseline is None else x(v.baseline),
            "beside": "" if v.baseline is None else _number(v.baseline),
            "against": v.against,
            "n": v.questions or v.scenes,
        }
        for arm in arms
        if (v := own.get(arm.name)) is not None
    ]
    ceiling = ceilings.get(figure)
    return {
        "title": title,
        "better": "higher is better" if higher else "lower is better",
        "rows": rows,
        "width": 2 * SPAN,
        "ceiling": None if ceiling is None else x(ceiling),
        "best": None if ceiling is None else _number(ceiling),
    }


def _comparisons(
    arms: Sequence[StudyArm], differences: Mapping[str, Mapping[str, Mapping[str, Difference]]]
) -> list[dict[str, Any]]:
    titles = {arm.name: arm.title for arm in arms}
    found = []
    for arm in arms:
        for other, by_figure in differences[arm.name].items():
            rows = []
            for figure, apart in by_figure.items():
                title, higher = FIGURES[figure]
                verdict = "open" if not apart.told else "better" if (apart.value > 0) == higher else "worse"
                said = f"{apart.value:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]"
                rows.append({"title": title, "said": said, "verdict": verdict, "seeds": ", ".join(apart.seeds)})
            found.append({"arm": arm.title, "against": titles[other], "rows": rows})
    return found


def _number(value: float) -> str:
    return f"{value:.3f}"
