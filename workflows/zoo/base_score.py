"""Scores the small base model on held-out rooms beside what needs no understanding, and writes its card.

Shape legend: N questions; R rooms.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from perceptio.rooms.expressions import look
from perceptio.rooms.questions import ask
from perceptio.rooms.render import render_room
from perceptio.rooms.room import Question
from perceptio.vlm.backbone import load_backbone
from workflows.zoo.aims import ANSWERS, aim
from workflows.zoo.base_rooms import SIDE, box_answer

HELD_OUT_SEED = 900
BATCH = 48
ANSWER_TOKENS = 16
RESAMPLES = 2000
Box = tuple[float, float, float, float]
Figures = dict[str, dict[str, float | int | str]]  # by question kind


@dataclass(frozen=True)
class Asked:
    """A held-out question as the base model meets it: no spatial tokens, so referring becomes box."""

    room: int
    image_HW3: npt.NDArray[np.uint8]
    question: Question


def held_out_questions(indices: Iterable[int], seed: int = HELD_OUT_SEED) -> list[Asked]:
    """All questions about the rooms; each expression with a mask is asked as a box question."""
    found = []
    for index in indices:
        room = render_room(seed, index, SIDE)
        sight = look(room)
        for q in ask(room):
            if q.kind == "referring" and len(q.objects) == 1:
                answer = box_answer(sight.box_O4[q.objects[0]])
                q = Question("box", q.form, f"Where is {q.expression}?", answer, q.expression, q.objects)
            if q.kind != "referring":
                found.append(Asked(index, room.rgb_HW3 if q.image_HW3 is None else q.image_HW3, q))
    return sorted(found, key=lambda a: a.question.kind)  # short answers together: a batch lasts as long as its longest


@torch.inference_mode()
def answers(folder: Path, asked: Sequence[Asked], with_image: bool = True) -> list[str]:
    """The model's greedy answers; without the image it is shown a plain grey one."""
    model, processor = load_backbone(folder, dtype=torch.float32)
    said: list[str] = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        texts = [_chat(processor, a.question.prompt) for a in part]
        images = [[a.image_HW3 if with_image else np.full_like(a.image_HW3, 127)] for a in part]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)  # type: ignore[misc]
        new_BT = out[:, inputs["input_ids"].shape[1] :]  # type: ignore[index]
        said += [str(processor.tokenizer.decode(ids, skip_special_tokens=True)) for ids in new_BT]
    return [text.strip() for text in said]


def score(folder: Path, indices: Iterable[int], seed: int = HELD_OUT_SEED) -> Figures:
    """Figures per question kind: the value, its 95 % interval over rooms, two blind baselines, and the gain's interval.

    `constant` is the best constant answer per form (position, where the question names its options), chosen on these
    very questions and so an upper bound; for boxes it is their mean box. `image_removed` the model before plain grey.
    """
    asked = held_out_questions(indices, seed)
    marks_N = {
        "value": np.array([_mark(a.question, text) for a, text in zip(asked, answers(folder, asked), strict=True)])
    }
    blind = answers(folder, asked, with_image=False)
    marks_N["image_removed"] = np.array([_mark(a.question, text) for a, text in zip(asked, blind, strict=True)])
    marks_N["constant"] = _constant_marks([a.question for a in asked])
    figures = {}
    for kind in sorted({a.question.kind for a in asked}):
        of_kind = np.array([a.question.kind == kind for a in asked])
        rooms = np.array([a.room for a in asked])[of_kind]
        means = {name: float(marks[of_kind].mean()) for name, marks in marks_N.items()}
        baseline = max(("constant", "image_removed"), key=lambda name: means[name])
        gains = marks_N["value"][of_kind] - marks_N[baseline][of_kind]
        low, high = _interval(marks_N["value"][of_kind], rooms)
        gain_low, gain_high = _interval(gains, rooms)
        figures[kind] = {
            "metric": "mean_iou" if kind == "box" else "accuracy",
            "n": int(of_kind.sum()),
            **{name: round(v, 4) for name, v in means.items()},
            "low": low,
            "high": high,
            "gain_low": gain_low,
            "gain_high": gain_high,
        }
    return figures


def first_figures(folder: Path, rooms: int) -> dict[str, float]:
    """The value of each question kind on the first so many held-out rooms, for a quicker check of the card."""
    asked = held_out_questions(range(rooms))
    marks: dict[str, list[float]] = defaultdict(list)
    for a, text in zip(asked, answers(folder, asked), strict=True):
        marks[a.question.kind].append(_mark(a.question, text))
    return {kind: round(float(np.mean(values)), 4) for kind, values in marks.items()}


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes whose corners are inclusive cells of a grid."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    shared = max(width, 0) * max(height, 0)
    areas = [max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0) for x0, y0, x1, y1 in (a, b)]
    return shared / max(sum(areas) - shared, 1e-9)


def parse_box(text: str) -> Box:
    """The box written in an answer; an empty one outside the image if there is none."""
    numbers = [float(n) for n in re.findall(r"\d+", text)]
    return (numbers[0], numbers[1], numbers[2], numbers[3]) if len(numbers) == 4 else (-2, -2, -3, -3)


def write_card(out: Path, figures: Figures, runs: list[dict[str, float]]) -> None:
    """Writes `card.json` and `README.md` beside the model."""
    card = {
        "license": "apache-2.0",
        "held_out_seed": HELD_OUT_SEED,
        "figures": figures,
        "first_100": first_figures(out, 100),
        "runs": runs,
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    (out / "README.md").write_text(readme(out, figures, runs))


def readme(out: Path, figures: Figures, runs: list[dict[str, float]]) -> str:
    """The model card of the folder `out`."""
    rows = [
        f"| {kind} | {f['metric']} | {f['n']} | **{f['value']:.3f}** [{f['low']:.3f}, {f['high']:.3f}] "
        f"| {f['constant']:.3f} | {f['image_removed']:.3f} | [{f['gain_low']:+.3f}, {f['gain_high']:+.3f}] |"
        for kind, f in figures.items()
    ]
    total = {
        key: sum(run.get(key, 0) for run in runs)
        for key in ("reason_minutes", "reasoned", "look_minutes", "looks", "minutes", "packs")
    }
    model, processor = load_backbone(out, dtype=torch.float32)
    parts = {"parameters": sum(p.numel() for p in model.parameters()) / 1e6, "tokens": len(processor.tokenizer)}
    again = f" and, {len(runs) - 1} time(s), `--more`" if len(runs) > 1 else ""
    aims = "\n".join(
        aim(f"Accuracy of {kind}", float(figures[kind]["value"]), ANSWERS) for kind in ("attribute", "count")
    )
    return README.format(
        rows="\n".join(rows),
        seed=HELD_OUT_SEED,
        side=SIDE,
        rooms=runs[-1]["rooms"],
        again=again,
        aims=aims,
        **parts,
        **total,
    )


def _chat(processor: object, prompt: str) -> str:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    return str(processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False))  # type: ignore[attr-defined]


def _mark(question: Question, text: str) -> float:
    if question.kind == "box":
        return iou(parse_box(text), parse_box(question.answer))
    return float(text == question.answer)


def _constant_marks(questions: Sequence[Question]) -> npt.NDArray[np.float64]:
    """How the best constant answer of each form does on each question; for boxes, the mean box."""
    boxes = np.array([parse_box(q.answer) for q in questions if q.kind == "box"])
    mean_box: Box = tuple(boxes.mean(0))
    seen: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
    for q in questions:
        if q.kind != "box":
            seen[q.kind, q.form][q.choices.index(q.answer)] += 1
    return np.array(
        [
            iou(mean_box, parse_box(q.answer))
            if q.kind == "box"
            else float(q.choices.index(q.answer) == seen[q.kind, q.form].most_common(1)[0][0])
            for q in questions
        ]
    )


def _interval(marks_N: npt.NDArray[np.float64], rooms_N: npt.NDArray[np.int64]) -> tuple[float, float]:
    """The 95 % interval of the mean, by resampling rooms (questions about one room are not independent)."""
    _, room_N = np.unique(rooms_N, return_inverse=True)
    sum_R, count_R = np.bincount(room_N, marks_N), np.bincount(room_N)
    drawn = np.random.default_rng(0).integers(len(sum_R), size=(RESAMPLES, len(sum_R)))
    low, high = np.quantile(sum_R[drawn].sum(1) / count_R[drawn].sum(1), (0.025, 0.975))
    return round(float(low), 4), round(float(high), 4)


README = """---
license: apache-2.0
library_name: transformers
---

# Base: a small InternVL that knows rooms

`InternVLForConditionalGeneration` (transformers' own class), trained from nothing on rooms that the project renders.
It answers questions in text and knows no spatial tokens: it is what room-scale runs start from, in the place that
InternVL2.5 takes at full size. {parameters:.2f} M parameters, stored in fp16: a vision tower of 5 layers on 16 x 16
patches of a {side}-pixel image, 64 image tokens by pixel shuffle, and a Qwen2 of 6 layers with tied embeddings and a
byte-level BPE vocabulary of {tokens} tokens in which each number of one or two digits is one.

    python -m workflows.zoo.base --out perceptio/rooms/zoo/base

That command{again} learnt from {rooms} rooms, on two CPU threads, in three parts whose minutes are of processor time.
First the text model learnt to answer ({reason_minutes:.0f} minutes, {reasoned:,} images with many questions each) from
exact image tokens, which a table makes of what each cell shows: kind, colour, box, inverse depth, letter. One new kind
of question came at a time: what is named and its colour, counts, yes/no, then all. Then the vision tower learnt to make
these tokens of pixels ({look_minutes:.0f} minutes, {looks:,} images), while a head, no part of the model, read the same
from them in the text model's own word and number embeddings. Last, with the vision tower frozen, both were joined
({minutes:.0f} minutes, {packs:,} images). The questions: count, attribute, yes/no, distance, choice and points; `Where
is EXPRESSION?`, or a form in which a mask will be asked for later, -> `[[x0, y0, x1, y1]]` in hundredths of the image's
side; and how close each part of a 6 x 6 grid is (not scored here). A question sees the image and no other question, so
that none is answered from another's words, and every answer counts alike, however many tokens it has. Behind `[[` and
before all other answers another head, no part of the model either, read which patches show what the answer is read
from: `[[` is where [SEG] will start, so all of a box is known there. `card.json` has the runs one by one.

## Held-out rooms (seed {seed})

Value with its 95 % interval (rooms resampled), and two answers that need no image: the best constant answer, chosen on
these very questions (for boxes the mean box), and the model itself before a grey image. The last column is the paired
95 % interval of the gain over the better of the two: where it holds 0, nothing was shown to be learnt.

| questions | measure | n | value | constant | image removed | gain |
|---|---|---|---|---|---|---|
{rows}

Aims. {aims}

Rendered rooms are all it has seen: it says nothing of use about photographs. Licence: Apache-2.0, data and weights are
the project's own.
"""
