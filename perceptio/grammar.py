"""The order of a reply: `[SEG]` x objects, then the depth block, then the text (paper).

For the study of that order the depth block may also stand behind the text (`depth_after_text`).

One definition serves three uses: which tokens may come next (constrained decoding), what a finished reply holds
(parsing), and whether a free reply was well formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, get_args

from perceptio.vocabulary import SpatialVocabulary

Part = Literal["auto", "on", "off"]
PARTS = get_args(Part)


class Phase(Enum):
    """Where in the reply the next token stands."""

    OBJECTS = "objects"  # before the depth block or the text: another [SEG] may come
    CODES = "codes"  # inside the depth block, codes still to come
    DEPTH_END = "depth_end"  # all codes are there
    TEXT = "text"
    DEPTH_START = "depth_start"  # the words are at their end, and a demanded depth block is still to come
    END = "end"  # behind a depth block that stands last


@dataclass(frozen=True)
class State:
    """How far a reply has come; immutable, so that a decoder may keep one per sequence."""

    phase: Phase = Phase.OBJECTS
    objects: int = 0
    codes: int = 0
    depth_done: bool = False


@dataclass(frozen=True)
class Allowed:
    """Which kinds of token may come next; `end` is the end of turn."""

    seg: bool = False
    depth_start: bool = False
    codes: bool = False
    depth_end: bool = False
    text: bool = False
    end: bool = False


@dataclass(frozen=True)
class Reply:
    """A reply taken apart, up to its first violation. `problem` is empty where the reply follows the grammar."""

    objects: int
    codes: tuple[int, ...]
    text_ids: tuple[int, ...]
    problem: str

    @property
    def well_formed(self) -> bool:
        return not self.problem


@dataclass(frozen=True)
class ReplyGrammar:
    """The grammar of one request (lineage: AURORA forces the count at decode time; form: reconstruction).

    `tokens` is N. `segmentation` / `depth`: "on" demands the part, "off" forbids it, "auto" leaves it to the model.
    `control_ids` are the tokenizer's other special tokens but the end of turn, which no reply may hold, and `size` is
    one more than its last id. Raises ValueError for another part than these, and for no object or code at all.
    """

    vocabulary: SpatialVocabulary
    tokens: int
    max_objects: int
    segmentation: Part = "auto"
    depth: Part = "auto"
    depth_after_text: bool = False
    control_ids: frozenset[int] = frozenset()
    size: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("segmentation", self.segmentation), ("depth", self.depth)):
            if value not in PARTS:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(PARTS)}")
        for name, number in (("tokens", self.tokens), ("max_objects", self.max_objects)):
            if number < 1:
                raise ValueError(f"{name} is {number}, expected at least 1")

    @property
    def longest_block(self) -> int:
        """The most tokens that a reply may have beside its text."""
        return (self.segmentation != "off") * self.max_objects + (self.depth != "off") * (self.tokens + 2)

    def allowed(self, state: State) -> Allowed:
        """The kinds of token that may follow `state`."""
        match state.phase:
            case Phase.CODES:
                return Allowed(codes=True)
            case Phase.DEPTH_END:
                return Allowed(depth_end=True)
            case Phase.DEPTH_START:
                return Allowed(depth_start=True)
            case Phase.END:
                return Allowed(end=True)
            case Phase.TEXT:
                last = self.depth_after_text and self.depth != "off"
                return Allowed(text=True, depth_start=last, end=not last or self.depth == "auto")
            case Phase.OBJECTS:
                enough = state.objects > 0 or self.segmentation != "on"
                first = self.depth != "off" and not self.depth_after_text
                return Allowed(
                    seg=self.segmentation != "off" and state.objects < self.max_objects,
                    depth_start=enough and first,
                    text=enough and not (first and self.depth == "on"),
                    end=enough and self.depth != "on",
                )

    def advance(self, state: State, token_id: int) -> State:
        """The state after one more token; raises ValueError where the grammar does not allow it."""
        kind, allowed = self.kind(token_id), self.allowed(state)
        if not getattr(allowed, kind, False):
            raise ValueError(f"token {token_id} ({kind}) cannot follow phase '{state.phase.value}'")
        match kind:
            case "seg":
                return State(Phase.OBJECTS, state.objects + 1)
            case "depth_start":
                return State(Phase.CODES, state.objects)
            case "codes":
                phase = Phase.DEPTH_END if state.codes + 1 == self.tokens else Phase.CODES
                return State(phase, state.objects, state.codes + 1)
            case "depth_end":
                after = Phase.END if self.depth_after_text else Phase.TEXT
                return State(after, state.objects, state.codes, depth_done=True)
            case _:
                return State(Phase.TEXT, state.objects, state.codes, state.depth_done)

    def without_more_words(self, state: State) -> State | None:
        """The state after the last word that fits: None where the reply may end there."""
        return None if self.allowed(state).end else State(Phase.DEPTH_START, state.objects)

    def parse(self, ids: Sequence[int]) -> Reply:
        """The reply in `ids` (without the prompt, without what follows the end of turn).

        Never raises on what a model wrote, and never mends it: the first violation goes into `problem`, and nothing
        behind it is read. Codes are given where their block is whole, and only there.
        """
        state, problem = State(), ""
        text: list[int] = []
        codes: list[int] = []
        for position, token_id in enumerate(ids):
            try:
                state = self.advance(state, token_id)
            except ValueError as error:
                problem = f"position {position}: {error}"
                break
            match self.kind(token_id):
                case "text":
                    text.append(token_id)
                case "codes":
                    codes.append(token_id)
        if not problem and state.phase is Phase.DEPTH_END:
            problem = f"the depth block ends after {state.codes} codes without its end marker"
        elif not problem and state.phase is Phase.CODES:
            problem = f"the depth block ends after {state.codes} of {self.tokens} codes"
        elif not problem and not self.allowed(state).end:
            problem = "the reply ends before a demanded part"
        whole = self.vocabulary.codes_of_ids(codes) if state.depth_done else []
        return Reply(state.objects, tuple(whole), tuple(text), problem)

    def kind(self, token_id: int) -> str:
        """What a token is to the grammar: the name of a field of `Allowed`, or "control", which is never allowed.

        It does not know the end of turn.
        """
        vocabulary = self.vocabulary
        if token_id in vocabulary.code_ids:
            return "codes"
        if token_id in self.control_ids or token_id < 0 or (self.size is not None and token_id >= self.size):
            return "control"
        named = {
            vocabulary.seg_id: "seg",
            vocabulary.depth_start_id: "depth_start",
            vocabulary.depth_end_id: "depth_end",
        }
        return named.get(token_id, "text")
