"""All questions about one room, each with a unique right answer, drawn so that blind guesses are right by chance alone.

Shape legend: C candidates, M blind guesses, O objects.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from perceptio.rooms.balance import Floats, draw, top_share
from perceptio.rooms.expressions import Bools, Expression, Sight, classes, expressions, look, names
from perceptio.rooms.furniture import COLORS
from perceptio.rooms.points import ask_points
from perceptio.rooms.room import Question, Room

REFERRING = 4  # questions a room
BOXES = 2
FORMS = (
    "Please segment {} in this image.",
    "Segment {}.",
    "Can you segment {} in this image?",
    "Could you mark {} in the picture?",
    "Please show me {} in this image.",
    "Mark {} in this image, please.",
    "Where is {} in this image? Answer with a mask.",
    "Please outline {} in this picture.",
    "I am looking for {} in this room. Please segment it.",
    "Give me a mask of {}.",
    "Please find {} in this room and mask it.",
    "What belongs to {} in this image? Please respond with a mask.",
    "Cut out {} in this picture.",
    "Highlight {} in this image.",
    "Which pixels show {} in this room? Mark them.",
    "Return the segmentation of {} in this image.",
)
LETTERS = "ABCD"
INSTRUCTION = "Answer with the option's letter from the given choices directly."
DISTANCES = 2
CHOICES = 2


def ask(room: Room) -> tuple[Question, ...]:
    """All questions about a room: a pure function of the room, with its own random stream from (seed, index).

    A question is left out where the room allows no unambiguous or no balanced one; which ones are left out never
    depends on the answer.
    """
    rng = np.random.default_rng([room.seed, room.index, 0x5EE])
    sight = look(room)
    return (
        *_referring(sight, rng),
        *_boxes(sight, rng, room.instance_HW.shape),
        *ask_points(room, rng),
        *_in_words(sight, rng),
    )


def ask_again(room: Room, times: int) -> tuple[Question, ...]:
    """More questions about a room, of the kinds answered in words: `times` further draws, no prompt twice.

    For training where one question of a kind would be too few; none of them is `ask`'s own draw.
    """
    rng, sight = np.random.default_rng([room.seed, room.index, 0x5EE, 1]), look(room)
    found = {q.prompt: q for _ in range(times) for q in _in_words(sight, rng)}
    return tuple(found.values())


def _in_words(sight: Sight, rng: np.random.Generator) -> Iterator[Question]:
    yield from _distance(sight, rng)
    yield from _count(sight, rng)
    yield from _color(sight, rng)
    yield from _exists(sight, rng)
    yield from _compare(sight, rng)
    yield from _choice(sight, rng)


def _object_marks(sight: Sight) -> Floats:
    """For each object [O, 2], how far "the largest object" and "the most central object" name it."""
    clear = np.flatnonzero(sight.clear_O)
    marks_O2 = np.zeros((len(sight.objects), 2))
    if len(clear):
        out = np.hypot(*(sight.center_O2[clear] - 0.5).T)
        marks_O2[clear] = np.stack([top_share(sight.pixels_O[clear]), top_share(-out)], -1)
    return marks_O2


def _referring(sight: Sight, rng: np.random.Generator) -> Iterator[Question]:
    pool = expressions(sight)
    if not pool:
        return
    single = [(e, (e.target,)) for e in pool]
    named = [e for e in pool if e.form in ("attribute", "size")]
    double = [(Expression("pair", f"{a.text} and {b.text}", a.target), (a.target, b.target))
              for a in named for b in named if a.target != b.target]  # fmt: skip
    candidates = single + double
    forms = [e.form for e, _ in candidates]
    wish_C = np.array([1 / forms.count(form) for form in forms])
    marks_O2 = _object_marks(sight)
    marks_C2 = np.array([(marks_O2[objects[0]] + marks_O2[objects[-1]]) / 2 for _, objects in candidates])
    chance_2 = np.full(2, 1 / sight.clear_O.sum())
    prompts = rng.permutation(len(FORMS))
    for k in range(REFERRING):
        chosen = draw(rng, marks_C2, chance_2, wish_C)
        if chosen is None:
            return
        expression, objects = candidates[chosen]
        prompt = FORMS[prompts[k]].format(expression.text)
        yield Question("referring", expression.form, prompt, "Sure.", expression.text, objects)


def _boxes(sight: Sight, rng: np.random.Generator, shape: tuple[int, ...]) -> Iterator[Question]:
    pool = [(text, i) for i, phrases in names(sight.objects).items() if sight.clear_O[i] for text in phrases]
    if not pool:
        return
    marks_C2 = _object_marks(sight)[[i for _, i in pool]]
    height, width = shape
    seen = set()
    for _ in range(BOXES):
        chosen = draw(rng, marks_C2, np.full(2, 1 / sight.clear_O.sum()))
        if chosen is None or chosen in seen:
            return
        seen.add(chosen)
        text, i = pool[chosen]
        x0, y0, x1, y1 = (int(v) * 100 // side for v, side in zip(sight.box_O4[i], (width, height) * 2, strict=True))
        yield Question("box", "box", f"Where is {text}?", f"[[{x0}, {y0}, {x1}, {y1}]]", text, (i,))


def _near_pair(sight: Sight, rng: np.random.Generator, allowed_OO: Bools) -> tuple[int, int] | None:
    """Two objects, the closer one first: as often the higher, the smaller or the less central of the two."""
    pairs = [(int(a), int(b)) for a, b in np.argwhere(sight.near_OO & allowed_OO) if _told_by_color(sight, a, b)]
    if not pairs:
        return None
    near, far = np.array(pairs).T
    out_O = np.hypot(*(sight.center_O2 - 0.5).T)
    guesses = (sight.center_O2[:, 1], sight.pixels_O, -out_O)
    marks_CM = np.stack([(np.sign(g[near] - g[far]) + 1) / 2 for g in guesses], -1)
    chosen = draw(rng, marks_CM, np.full(len(guesses), 0.5))
    return None if chosen is None else pairs[chosen]


def _told_by_color(sight: Sight, *pair: int) -> list[str]:
    """Names that differ in the colour alone; empty where these fit other objects too.

    Mugs are close and bookcases far more often than not: with a kind of its own for each, text alone would tell.
    """
    two = [sight.objects[i] for i in pair]
    groups = classes(sight.objects)
    nouns = [two[0].kind] * (two[0].kind == two[1].kind) + ["object"]
    sizes = ["", f"{two[0].size} "] if two[0].size == two[1].size else [""]
    for size, noun in itertools.product(sizes, nouns):
        phrases = [f"{size}{o.color} {noun}" for o in two]
        if all(len(groups[phrase]) == 1 for phrase in phrases):
            return [f"the {phrase}" for phrase in phrases]
    return []


def _distance(sight: Sight, rng: np.random.Generator) -> Iterator[Question]:
    for _ in range(DISTANCES):
        pair = _near_pair(sight, rng, ~np.eye(len(sight.objects), dtype=bool))
        if pair:
            texts = _told_by_color(sight, *pair)
            first, second = (str(text) for text in rng.permutation(texts))
            prompt = f"Which is closer to the camera, {first} or {second}?"
            yield Question("distance", "pair", prompt, texts[0], choices=(first, second), about=pair[:1])


def _compare(sight: Sight, rng: np.random.Generator) -> Iterator[Question]:
    """Yes or no: drawn first, then the two objects are named in the order that makes it so."""
    called = names(sight.objects, sized=False)
    sides = [(int(a), int(b)) for a, b in np.argwhere(sight.left_OO) if called[a] and called[b]]
    if sides:
        a, b = sides[rng.integers(len(sides))]
        texts = [str(rng.choice(called[a])), str(rng.choice(called[b]))]
        yield _yes_no(rng, "left", "Is {} to the left of {}?", texts, (a, b))
    pair = _near_pair(sight, rng, ~np.eye(len(sight.objects), dtype=bool))
    if pair:
        yield _yes_no(rng, "closer", "Is {} closer to the camera than {}?", _told_by_color(sight, *pair), pair)


def _yes_no(rng: np.random.Generator, form: str, question: str, texts: list[str], about: tuple[int, int]) -> Question:
    answer = bool(rng.integers(2))
    prompt = question.format(*(texts if answer else texts[::-1]))
    return Question("yes_no", form, prompt, "Yes" if answer else "No", choices=("Yes", "No"), about=about)


def _exists(sight: Sight, rng: np.random.Generator) -> Iterator[Question]:
    """Whether some object is there. Both answers ask for a kind that is there, so neither kind nor colour tells."""
    if not sight.clear_O.any():
        return
    o = sight.objects[rng.choice(np.flatnonzero(sight.clear_O))]
    absent = [c for c in COLORS if all(c != other.color for other in sight.objects if other.kind == o.kind)]
    if not absent:
        return
    color, answer = (o.color, "Yes") if rng.integers(2) else (str(rng.choice(absent)), "No")
    prompt = f"Is there {_a(color)} {o.kind} in this room?"
    meant = tuple(other.index for other in sight.objects if (other.kind, other.color) == (o.kind, color))
    yield Question("yes_no", "exists", prompt, answer, choices=("Yes", "No"), about=meant)


def _count(sight: Sight, rng: np.random.Generator) -> Iterator[Question]:
    """How many objects have a colour (0 to 2), or one of two colours (1 to 4): asked only if every answer can be drawn.

    Colours are interchangeable in a room, kinds are not: a number of chairs could be guessed from the question alone.
    """
    if not sight.clear_O.all():
        return
    number = {c: sum(o.color == c for o in sight.objects) for c in COLORS}
    one = dict(number)
    two = {f"{c} or {d}": number[c] + number[d] for c in COLORS for d in COLORS if c != d}
    for form, counts, answers in (("color", one, (0, 1, 2)), ("either", two, (1, 2, 3, 4))):
        if set(answers) <= set(counts.values()):
            answer = int(rng.choice(answers))
            words = str(rng.choice([w for w, n in counts.items() if n == answer]))
            choices = tuple(str(n) for n in answers)
            prompt = f"How many {words} objects are in this room?"
            counted = tuple(o.index for o in sight.objects if o.color in words.split())
            yield Question("count", form, prompt, str(answer), choices=choices, about=counted)


def _named_color(sight: Sight, rng: np.random.Generator) -> tuple[str, str, int] | None:
    """A phrase without a colour that fits one object, its colour, by chance that of the largest or most central, and
    its index."""
    pool = [(text, i) for i, phrases in names(sight.objects).items() if sight.clear_O[i]
            for text in phrases if sight.objects[i].color not in text.split()]  # fmt: skip
    if not pool:
        return None
    clear = np.flatnonzero(sight.clear_O)
    largest = clear[sight.pixels_O[clear].argmax()]
    central = clear[np.hypot(*(sight.center_O2[clear] - 0.5).T).argmin()]
    same = [[float(sight.objects[i].color == sight.objects[j].color) for j in (largest, central)] for _, i in pool]
    chosen = draw(rng, np.array(same), np.full(2, 1 / len(COLORS)))
    if chosen is None:
        return None
    phrase, index = pool[chosen]
    return phrase, sight.objects[index].color, index


def _color(sight: Sight, rng: np.random.Generator) -> Iterator[Question]:
    found = _named_color(sight, rng)
    if found:
        phrase, color, index = found
        yield Question("attribute", "color", f"What colour is {phrase}?", color, choices=tuple(COLORS), about=(index,))


def _choice(sight: Sight, rng: np.random.Generator) -> Iterator[Question]:
    """Questions with four options after MMBench, each of another form."""
    makers = (_which_color, _which_exists, _which_place)
    found = [question for i in rng.permutation(len(makers)) if (question := makers[i](sight, rng))]
    yield from found[:CHOICES]


def _which_color(sight: Sight, rng: np.random.Generator) -> Question | None:
    found = _named_color(sight, rng)
    if not found:
        return None
    others = rng.permutation([c for c in COLORS if c != found[1]])[:3]
    return _options(rng, "color", f"What colour is {found[0]}?", found[1], [str(c) for c in others], found[2:])


def _which_exists(sight: Sight, rng: np.random.Generator) -> Question | None:
    if not sight.clear_O.any():
        return None
    o = sight.objects[rng.choice(np.flatnonzero(sight.clear_O))]
    absent = [c for c in COLORS if all(c != other.color for other in sight.objects if other.kind == o.kind)]
    options = [f"{_a(str(c))} {o.kind}" for c in (o.color, *rng.permutation(absent)[:3])]
    return (
        _options(rng, "exists", "Which of these is in this room?", options[0], options[1:], (o.index,))
        if len(options) > 3
        else None
    )


def _which_place(sight: Sight, rng: np.random.Generator) -> Question | None:
    """Where one object stands to another, as the camera sees them: side and distance, each as likely."""
    pair = _near_pair(sight, rng, sight.left_OO | sight.left_OO.T)
    if not pair:
        return None
    swapped = bool(rng.integers(2))
    a, b = pair[::-1] if swapped else pair
    first, second = _told_by_color(sight, a, b)
    depth, side = ("farther away" if swapped else "closer"), ("left" if sight.left_OO[a, b] else "right")
    options = {(d, s): f"{d} and to the {s}" for d in ("closer", "farther away") for s in ("left", "right")}
    right = options.pop((depth, side))
    asked = f"Seen from the camera, where is {first} compared with {second}?"
    return _options(rng, "place", asked, right, [*options.values()], pair)


def _options(
    rng: np.random.Generator, form: str, question: str, right: str, wrong: list[str], about: tuple[int, ...]
) -> Question:
    order = rng.permutation(4)
    options = [[right, *wrong][i] for i in order]
    lines = [question, *(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=True)), INSTRUCTION]
    answer = LETTERS[int(np.flatnonzero(order == 0)[0])]
    return Question("choice", form, "\n".join(lines), answer, choices=tuple(LETTERS), about=about)


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
