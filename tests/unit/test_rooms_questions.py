"""Questions about rooms: deterministic, well formed, and not to be guessed without looking."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from perceptio.rooms.balance import balanced_weights
from perceptio.rooms.expressions import expressions, look
from perceptio.rooms.furniture import COLORS
from perceptio.rooms.points import MARGIN, PROMPT, draw_points
from perceptio.rooms.questions import FORMS, ask, ask_again
from perceptio.rooms.render import render_room
from perceptio.rooms.room import BACKGROUND, FLOOR, Question, Room, RoomObject
from perceptio.rooms.solver import solve

SIZE = 64
Asked = list[tuple[Room, tuple[Question, ...]]]
Score = tuple[float, float]  # how far a guess is right (ties share), and the chance of a random answer
Guess = Callable[[Room, Question], Score | None]


def ask_many(seed: int, count: int) -> Asked:
    rooms = (render_room(seed, i, SIZE) for i in range(count))
    return [(room, ask(room)) for room in rooms]


@pytest.fixture(scope="module")
def asked() -> Asked:
    return ask_many(seed=5, count=160)


def painted(boxes: list[tuple[str, str, str, tuple[int, int, int, int], float]]) -> Room:
    """A flat room, 40 x 40: each object is a rectangle (x0, y0, x1, y1) at one depth, on a wall at 9 m."""
    depth_HW, instance_HW = np.full((40, 40), 9, np.float32), np.full((40, 40), BACKGROUND, np.int16)
    for i, (_, _, _, (x0, y0, x1, y1), z) in enumerate(boxes):
        depth_HW[y0:y1, x0:x1], instance_HW[y0:y1, x0:x1] = z, i
    objects = tuple(RoomObject(i, kind, color, size, FLOOR) for i, (size, color, kind, _, _) in enumerate(boxes))
    return Room(0, 0, np.zeros((40, 40, 3), np.uint8), depth_HW, instance_HW, objects)


def test_a_room_is_asked_the_same_questions_every_time() -> None:
    first, again = (ask(render_room(3, 4, SIZE)) for _ in range(2))
    assert [replace(q, image_HW3=None) for q in first] == [replace(q, image_HW3=None) for q in again]
    assert all(
        np.array_equal(a.image_HW3, b.image_HW3) for a, b in zip(first, again, strict=True) if a.image_HW3 is not None
    )


def test_asked_again_there_are_more_questions_and_all_of_them_have_the_solvers_answer() -> None:
    rooms = [render_room(6, i, SIZE) for i in range(12)]
    more = [ask_again(room, 6) for room in rooms]
    assert more == [ask_again(room, 6) for room in rooms]
    prompts = [[q.prompt for q in found] for found in more]
    assert all(len(set(own)) == len(own) for own in prompts)
    assert sum(map(len, more)) > 2 * sum(len(ask(room)) for room in rooms)
    assert {q.kind for found in more for q in found} == {"distance", "count", "attribute", "yes_no", "choice"}
    for room, found in zip(rooms, more, strict=True):
        for q in found:
            assert solve(q.prompt, room) == q.answer, q.prompt


def test_a_question_names_the_objects_that_its_answer_is_read_from(asked: Asked) -> None:
    for room, questions in asked:
        for q in questions:
            meant = [room.objects[i] for i in q.about]
            if q.kind == "attribute":
                assert [o.color for o in meant] == [q.answer]
            elif q.kind == "count":
                assert len(meant) == int(q.answer)
            elif q.form == "exists" and q.kind == "yes_no":
                assert bool(meant) == (q.answer == "Yes")
            elif q.kind == "distance":
                assert len(meant) == 1 and meant[0].color in q.answer
            elif q.kind in ("referring", "box", "points"):
                assert not q.about, "objects and points say it"
            else:
                assert len(meant) in (1, 2)


def test_expressions_of_a_painted_room_mean_what_they_say() -> None:
    room = painted([
        ("small", "red", "ball", (2, 20, 8, 26), 2.0),
        ("small", "blue", "ball", (16, 20, 22, 26), 3.0),
        ("large", "red", "ball", (30, 20, 36, 26), 4.0),
        ("large", "green", "sofa", (9, 2, 15, 12), 2.5),
    ])  # fmt: skip
    meant = {e.text: e.target for e in expressions(look(room))}
    expected = {
        "the blue ball": 1, "the small red ball": 0, "the large ball": 2, "the leftmost ball": 0,
        "the ball closest to the camera": 0, "the second ball from the left": 1, "the second ball from the right": 1,
        "the ball to the left of the sofa": 0, "the ball in front of the sofa": 0,
        "the ball farthest from the camera": 2,
    }  # fmt: skip
    assert expected.items() <= meant.items()
    assert not {"the red ball", "the small ball", "the ball behind the sofa", "the ball"} & meant.keys()


def test_what_is_too_close_to_call_is_not_said() -> None:
    near_tie = painted(
        [("small", "red", "ball", (10, 20, 16, 26), 2.0), ("small", "blue", "ball", (11, 30, 17, 36), 2.1)]
    )
    assert {e.text for e in expressions(look(near_tie))} == {
        "the red ball", "the small red ball", "the blue ball", "the small blue ball"
    }  # fmt: skip


def test_hidden_objects_still_make_a_name_ambiguous() -> None:
    room = painted([("small", "red", "ball", (2, 2, 9, 9), 2.0), ("large", "red", "ball", (0, 0, 0, 0), 2.0)])
    texts = {e.text for e in expressions(look(room))}
    assert "the red ball" not in texts and "the small red ball" in texts and "the large red ball" not in texts


def test_questions_are_well_formed(asked: Asked) -> None:
    for room, questions in asked:
        assert len({q.prompt for q in questions if q.kind == "referring"}) == sum(
            q.kind == "referring" for q in questions
        )
        for q in questions:
            assert not q.choices or q.answer in q.choices
            if q.kind == "referring":
                assert q.expression in q.prompt and q.expression == q.expression.lower() and q.expression[-1] != "."
                assert q.objects and all(room.visible_pixels[i] > 0 for i in q.objects)
    kinds = Counter(q.kind for _, questions in asked for q in questions)
    assert all(
        kinds[kind] > 30
        for kind in ("referring", "points", "distance", "count", "attribute", "yes_no", "choice", "box")
    )
    forms = Counter(q.form for _, questions in asked for q in questions if q.kind == "referring")
    assert forms.keys() == {"attribute", "size", "absolute", "relative", "ordinal", "support", "pair"}
    assert len(FORMS) == len(set(FORMS)) == 16


def test_points_lie_apart_and_one_is_clearly_the_closest(asked: Asked) -> None:
    for room, questions in asked:
        for q in (q for q in questions if q.kind == "points"):
            assert q.prompt == PROMPT and f"points_{len(q.points_xy)}" == q.form
            z = np.array([room.depth_HW[y, x] for x, y in q.points_xy])
            assert q.answer == f"({'ABCDE'[z.argmin()]})"
            assert np.sort(z)[1] >= MARGIN * z.min()
            on = [room.instance_HW[y, x] for x, y in q.points_xy if room.instance_HW[y, x] != BACKGROUND]
            assert len(on) == len(set(on)), "two points on one object"
            assert q.image_HW3 is not None and not np.array_equal(q.image_HW3, room.rgb_HW3)


def test_a_letter_beside_its_circle_can_be_told_from_the_others() -> None:
    grey = np.full((128, 128, 3), 90, np.uint8)
    drawn = [draw_points(grey, ((20, 20),) * k)[10:31, 10:50] for k in range(1, 6)]
    assert len({image.tobytes() for image in drawn}) == 5
    corner = draw_points(grey, ((127, 0),))
    assert (corner[:5, 100:] == 255).any(), "the letter stays inside the image"


def test_balanced_weights_meet_the_chances_or_say_that_none_do() -> None:
    marks_CM = np.array([[1.0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    weights_C = balanced_weights(marks_CM, np.array([0.25, 0.5]))
    assert weights_C is not None
    np.testing.assert_allclose(weights_C @ marks_CM, [0.25, 0.5], atol=3e-3)
    assert balanced_weights(np.array([[1.0], [1.0]]), np.array([0.5])) is None


# Blind guesses. Each gives how far it is right, and the chance of being right by a random answer.


def share(values: list[float] | np.ndarray, right: int) -> float:
    top = np.asarray(values) == np.max(values)
    return float(top[right] / top.sum())


def middle(room: Room, i: int) -> np.ndarray:
    """Mean place of an object, from the image's middle; in pixels, down and right."""
    return np.argwhere(room.instance_HW == i).mean(0) - (SIZE - 1) / 2


def guess_point(value: Callable[[Room, int, int], float], room: Room, q: Question) -> Score | None:
    if q.kind != "points":
        return None
    return share([value(room, x, y) for x, y in q.points_xy], q.choices.index(q.answer)), 1 / len(q.choices)


def guess_object(value: Callable[[Room, int], float], room: Room, q: Question) -> Score | None:
    if q.kind not in ("referring", "box") or len(q.objects) != 1:
        return None
    return share([value(room, o.index) for o in room.objects], q.objects[0]), 1 / len(room.objects)


def guess_closer(value: Callable[[Room, int], float], room: Room, q: Question) -> Score | None:
    if q.kind != "distance":
        return None
    named = [i for text in q.choices for i in solve(f"Segment {text}.", room) if isinstance(i, int)]
    return share([value(room, i) for i in named], q.choices.index(q.answer)), 0.5


def guess_color(value: Callable[[Room, int], float], room: Room, q: Question) -> Score | None:
    if q.kind != "attribute":
        return None
    best = max(room.objects, key=lambda o: value(room, o.index))
    return float(best.color == q.answer), 1 / len(COLORS)


def guess_place(place: int, room: Room, q: Question) -> Score | None:
    """The first (or last) of the closed set of answers."""
    return (float(q.choices[place] == q.answer), 1 / len(q.choices)) if q.choices else None


def pixels(room: Room, i: int) -> float:
    return float(room.visible_pixels[i])


def pixels_at(room: Room, x: int, y: int) -> float:
    return pixels(room, room.instance_HW[y, x]) if room.instance_HW[y, x] != BACKGROUND else 0.0


BLIND: dict[str, Guess] = {
    "lowest point": partial(guess_point, lambda room, x, y: y),
    "highest point": partial(guess_point, lambda room, x, y: -y),
    "most central point": partial(guess_point, lambda room, x, y: -math.hypot(x - SIZE / 2, y - SIZE / 2)),
    "point on the largest object": partial(guess_point, pixels_at),
    "point on the smallest object or on none": partial(guess_point, lambda room, x, y: -pixels_at(room, x, y)),
    "largest object": partial(guess_object, pixels),
    "most central object": partial(guess_object, lambda room, i: -float(np.hypot(*middle(room, i)))),
    "larger object is closer": partial(guess_closer, pixels),
    "lower object is closer": partial(guess_closer, lambda room, i: float(middle(room, i)[0])),
    "more central object is closer": partial(guess_closer, lambda room, i: -float(np.hypot(*middle(room, i)))),
    "colour of the largest object": partial(guess_color, pixels),
    "colour of the most central object": partial(guess_color, lambda room, i: -float(np.hypot(*middle(room, i)))),
    "first answer": partial(guess_place, 0),
    "last answer": partial(guess_place, -1),
}


def clues(q: Question, place: int) -> Iterator[tuple[str, ...]]:
    """What the text alone says for one of the answers: each word, with the place at which it is asked about."""
    lines = q.prompt.split("\n")
    if q.kind == "distance":
        yield from (("closer", word) for word in q.choices[place].split())
    elif q.kind == "choice":
        yield from ((q.form, word) for word in lines[place + 1].split()[1:])
    yield (q.form, "answer", str(place))
    if q.kind != "choice":
        words = q.prompt.split()
        for a, b in zip(words, ["", *words], strict=False):
            yield (q.form, str(place), a)
            yield (q.form, str(place), b, a)


def text_only(asked: Asked) -> list[tuple[int, str, Score]]:
    """Naive Bayes over the words of a question, learnt on even rooms, asked on odd ones; (room, kind, score)."""
    right: dict[tuple[str, ...], float] = defaultdict(float)
    total: dict[tuple[str, ...], float] = defaultdict(float)
    for _, questions in asked[::2]:
        for q in questions:
            for place, answer in enumerate(q.choices):
                for clue in clues(q, place):
                    total[clue] += 1
                    right[clue] += answer == q.answer
    found = []
    for number, (_, questions) in enumerate(asked[1::2]):
        for q in questions:
            if q.choices:
                p = 1 / len(q.choices)
                odds = [
                    sum(math.log((right[c] + 4 * p) / (total[c] + 4)) for c in clues(q, k))
                    for k in range(len(q.choices))
                ]
                found.append((number, q.kind, (share(odds, q.choices.index(q.answer)), p)))
    return found


def blind_scores(asked: Asked) -> dict[str, list[tuple[int, Score]]]:
    """Every blind guess: the room and the score of each question that it answers."""
    scores: dict[str, list[tuple[int, Score]]] = defaultdict(list)
    for number, (room, questions) in enumerate(asked):
        for q in questions:
            for name, guess in BLIND.items():
                if found := guess(room, q):
                    scores[f"{name}: {q.kind}"].append((number, found))
    for number, kind, found in text_only(asked):
        scores[f"text alone: {kind}"].append((number, found))
    return scores


def deviation(scores: list[tuple[int, Score]]) -> float:
    """Standard errors between a guess and chance; questions about one room count as one draw."""
    rooms: dict[int, float] = defaultdict(float)
    for number, (score, chance) in scores:
        rooms[number] += score - chance
    return sum(rooms.values()) / math.sqrt(sum(v * v for v in rooms.values()))


def report(scores: dict[str, list[tuple[int, Score]]]) -> str:
    rows = []
    for name, found in sorted(scores.items()):
        mean, chance = np.mean([s for _, s in found], axis=0)
        rows.append(
            f"{name:50s} {len(found):5d}  {100 * mean:5.1f} %, chance {100 * chance:5.1f} % z {deviation(found):+.2f}"
        )
    return "\n".join(rows)


def assert_blind(asked: Asked) -> dict[str, list[tuple[int, Score]]]:
    """The scores of all guesses, which at once stay within chance's 95 % interval: 1.96 standard errors for one, more
    for about thirty."""
    scores = blind_scores(asked)
    bound = 3.15  # Bonferroni: two-sided 5 % over 30 guesses
    assert len(scores) >= 25
    assert all(abs(deviation(found)) <= bound for found in scores.values()), report(scores)
    return scores


def test_blind_guesses_are_right_by_chance_alone(asked: Asked) -> None:
    assert_blind(asked)


def test_the_check_of_blind_guesses_sees_a_shortcut(asked: Asked) -> None:
    """Where the letters are put in the order of height, the check must fail."""
    biased = [
        (room, tuple(replace(q, answer=q.choices[0]) if q.kind == "points" else q for q in questions))
        for room, questions in asked
    ]
    with pytest.raises(AssertionError, match="first answer: points"):
        assert_blind(biased)


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_blind_guesses_are_right_by_chance_alone_in_2000_rooms(record: Callable[..., None]) -> None:
    scores = assert_blind(ask_many(seed=6, count=2000))
    worst = max(scores, key=lambda name: abs(deviation(scores[name])))
    record(
        rooms=2000, guesses=len(scores), farthest_from_chance=worst, standard_errors=round(deviation(scores[worst]), 2)
    )
