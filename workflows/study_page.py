"""What the study found, as JSON and as a page: every arm beside its blind baseline, and beside the arm before it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from matplotlib.ticker import MaxNLocator

from schemas.recipe import Recipe, StudyArm
from workflows.charts import SPAN, Curve, curves_together
from workflows.page import render
from workflows.store import Root
from workflows.study_figures import (
    FIGURES,
    KINDS,
    PRIMARY,
    Difference,
    Run,
    Runs,
    Value,
    differences,
    pooled,
    replies,
    values,
)

SAID = ("arm", "seed", "code", "machine", "precision", "seconds")  # of a run
CURVES = {"text": "Loss of the words", "token": "Loss of the depth codes", "gradient_norm": "Norm of the gradient"}
FOLDER = "study"  # of the finished runs and study.json
TICKS = 5  # of an axis, about

Row = dict[str, Any]
Values = Mapping[str, Mapping[str, Value]]  # by arm, then by figure
Differences = Mapping[str, Mapping[str, Mapping[str, Difference]]]  # by arm, by the other arm, by figure


def write(recipe: Recipe, finished: Root, runs: Sequence[Run], command: str) -> str:
    """Writes study.json beside the runs and study.html above them; where the page lies."""
    assert recipe.study is not None
    arms = recipe.study.arms
    by_arm: Runs = {arm.name: {str(r["seed"]): r for r in runs if r["arm"] == arm.name} for arm in arms}
    draw = {"resamples": recipe.evaluate.bootstrap, "seed": recipe.seed}
    found = {arm.name: values(by_arm[arm.name], draw, forced=arm.codes != "own") for arm in arms}
    apart = {arm.name: differences(arm, by_arm, draw) for arm in arms}
    ceilings = {name: _ceiling(runs, figure.ceiling) for name, figure in FIGURES.items() if figure.ceiling}
    summary = {
        "recipe": recipe.name,
        "command": command,
        "notes": recipe.study.notes,
        "arms": [arm.model_dump() for arm in arms],
        "values": {arm: {f: asdict(v) for f, v in own.items()} for arm, own in found.items()},
        "differences": {
            arm: {other: {f: asdict(d) for f, d in own.items()} for other, own in against.items()}
            for arm, against in apart.items()
        },
        "ceilings": ceilings,
        "runs": [{key: run[key] for key in SAID} | {"codebook": run["inputs"]["codebook"][:8]} for run in runs],
    }
    finished.write(json.dumps(summary, indent=1).encode() + b"\n", FOLDER, "study.json")
    shown = [name for name in FIGURES if any(name in own for own in found.values())]
    page = render(
        "study.html.j2",
        recipe=recipe,
        arms=arms,
        notes=recipe.study.notes,
        titles={arm.name: arm.title for arm in arms},
        primary={name: PRIMARY[name].title for name in PRIMARY if name in shown},
        summary=_summary(arms, found),
        charts=[_chart(name, arms, found, ceilings.get(name)) for name in shown],
        forests=[_forest(name, arms, apart) for name in PRIMARY if name in shown],
        comparisons=_comparisons(arms, apart),
        replies=_replies(arms, by_arm),
        curves=[chart for name, title in CURVES.items() if (chart := _curves(title, name, arms, by_arm))],
        runs=summary["runs"],
        planned=sum(len(arm.seeds) for arm in arms),
        minutes=sum(sum(run["seconds"].values()) for run in runs) / 60,
        command=command,
    )
    finished.write(page.encode(), "study.html")
    return finished.at("study.html")


def _ceiling(runs: Sequence[Run], name: str) -> float | None:
    having = [run for run in runs if name in run["marks"]]
    return round(pooled(having, name).value, 4) if having else None


def _summary(arms: Sequence[StudyArm], found: Values) -> list[Row]:
    """A row an arm: of each primary figure its value, its seeds, and what its seeds say beside the blind guess."""
    return [
        {
            "title": arm.title,
            "cells": {
                name: {
                    "value": _number(own.value),
                    "seeds": " / ".join(map(_number, own.seeds.values())) if len(own.seeds) > 1 else "",
                    "blind": "" if own.baseline is None else _number(own.baseline),
                    "verdict": _together(list(own.verdicts.values())),
                }
                for name in PRIMARY
                if (own := found[arm.name].get(name))
            },
        }
        for arm in arms
        if found[arm.name]
    ]


def _together(verdicts: Sequence[str]) -> str:
    """What all seeds say, "" where there is nothing to say."""
    return "" if not verdicts else verdicts[0] if len(set(verdicts)) == 1 else "open"


class _Axis:
    """Places on a drawing of some width, and round numbers under it."""

    def __init__(self, marks: Sequence[float], width: float) -> None:
        low, high = min(marks), max(marks)
        margin = 0.05 * max(high - low, 1e-3)
        self.low, self.high, self.width = low - margin, high + margin, width

    def x(self, value: float) -> float:
        return round(self.width * (value - self.low) / (self.high - self.low), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels of round numbers."""
        values = MaxNLocator(TICKS).tick_values(self.low, self.high)
        return [(self.x(value), f"{value:.4g}") for value in values if self.low <= value <= self.high]


def _chart(name: str, arms: Sequence[StudyArm], found: Values, ceiling: float | None) -> Row:
    """One figure of every arm as a row of dots: all seeds with their interval, single seeds, baseline, ceiling."""
    own = {arm: figures[name] for arm, figures in found.items() if name in figures}
    marks = [x for v in own.values() for x in (v.low, v.high, *v.seeds.values())]
    marks += [v.baseline for v in own.values() if v.baseline is not None]
    axis = _Axis([*marks, ceiling] if ceiling is not None else marks, 2 * SPAN)
    figure = FIGURES[name]
    return {
        "title": figure.title,
        "better": "higher is better" if figure.higher_is_better else "lower is better",
        "width": axis.width,
        "ticks": axis.ticks(),
        "ceiling": None if ceiling is None else axis.x(ceiling),
        "best": None if ceiling is None else _number(ceiling),
        "rows": [
            {
                "title": arm.title,
                "value": _number(v.value),
                "interval": f"{_number(v.low)} to {_number(v.high)}",
                "seeds": " / ".join(map(_number, v.seeds.values())),
                "x": axis.x(v.value),
                "low": axis.x(v.low),
                "high": axis.x(v.high),
                "dots": [axis.x(value) for value in v.seeds.values()] if len(v.seeds) > 1 else [],
                "baseline": None if v.baseline is None else axis.x(v.baseline),
                "beside": "" if v.baseline is None else _number(v.baseline),
                "against": v.against,
                "n": f"{v.questions:,}",
            }
            for arm in arms
            if (v := own.get(arm.name)) is not None
        ],
    }


def _forest(name: str, arms: Sequence[StudyArm], apart: Differences) -> Row:
    """One figure's paired differences of all comparisons, around 0."""
    titles = {arm.name: arm.title for arm in arms}
    pairs = [(a.title, titles[other], d[name]) for a in arms for other, d in apart[a.name].items() if name in d]
    axis = _Axis([0.0, *(x for _, _, d in pairs for x in (d.low, d.high, *d.seeds.values()))], 1.5 * SPAN)
    return {
        "title": FIGURES[name].title,
        "better": "right of 0 is better" if FIGURES[name].higher_is_better else "left of 0 is better",
        "width": axis.width,
        "zero": axis.x(0),
        "ticks": axis.ticks(),
        "rows": [
            {
                "arm": arm,
                "other": other,
                "said": _said(d),
                "verdict": d.verdict,
                "x": axis.x(d.value),
                "low": axis.x(d.low),
                "high": axis.x(d.high),
                "dots": [axis.x(value) for value in d.seeds.values()] if len(d.seeds) > 1 else [],
            }
            for arm, other, d in pairs
        ],
    }


def _comparisons(arms: Sequence[StudyArm], apart: Differences) -> list[Row]:
    titles = {arm.name: arm.title for arm in arms}
    return [
        {
            "arm": arm.title,
            "against": titles[other],
            "rows": [
                {
                    "title": FIGURES[name].title,
                    "said": _said(d),
                    "seeds": " / ".join(f"{value:+.3f}" for value in d.seeds.values()),
                    "verdict": d.verdict,
                    "single": len(d.seeds) == 1,
                }
                for name, d in by_figure.items()
            ],
        }
        for arm in arms
        for other, by_figure in apart[arm.name].items()
        if by_figure
    ]


def _replies(arms: Sequence[StudyArm], by_arm: Runs) -> list[Row]:
    """By kind of question, an arm's replies as shares: right, wrong, none of the choices."""
    found = []
    for kind, title in {"closest_point": PRIMARY["closest_point_accuracy"].title, **KINDS}.items():
        rows = [(arm.title, replies(list(by_arm[arm.name].values()), kind)) for arm in arms]
        bars = [{"title": name, "shares": [round(100 * x, 1) for x in shares]} for name, shares in rows if shares]
        if bars:
            found.append({"title": title, "bars": bars})
    return found


def _curves(title: str, name: str, arms: Sequence[StudyArm], by_arm: Runs) -> Row | None:
    """One quantity over the steps, a line an arm (its first seed whose log is kept); None where no log is."""
    lines = []
    for arm in arms:
        kept = [run["curves"] for run in by_arm[arm.name].values() if run.get("curves")] if arm.codes == "own" else []
        if kept and any(kept[0].get(name, ())):
            lines.append(Curve(arm.title, kept[0]["step"], kept[0][name]))
    return curves_together(title, lines) if lines else None


def _said(d: Difference) -> str:
    return f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"


def _number(value: float) -> str:
    return f"{value:.3f}"
