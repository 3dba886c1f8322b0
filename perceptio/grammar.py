"""The order of a reply: `[SEG]` x objects, then the depth block, then the text.

One definition serves three uses: which tokens may come next (constrained decoding), what a finished reply holds
(parsing), and whether a free reply was well formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from perceptio.vocabulary import SpatialVocabulary

Part = Literal["auto", "on", "off"]


class Phase(Enum):
    """Where in the reply the next token stands."""

    OBJECTS = "objects"  # before the depth block or the text: another [SEG] may come
    CODES = "codes"  # inside the depth block, codes still to come
    DEPTH_END = "depth_end"  # all codes are there
    TEXT = "text"


@dataclass(frozen=True)
class State:
    """How far a reply has come; immutable, so that a decoder may keep one per sequence."""

    phase: Phase = Phase.OBJECTS
    objects: int = 0
    codes: int = 0
    depth_done: bool = False


@dataclass(frozen=True)
class Allowed:
    """Which kinds of token may come next."""

    seg: bool = False
    depth_start: bool = False
    codes: bool = False
    depth_end: bool = False
    text: bool = False


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
    """

    vocabulary: SpatialVocabulary
    tokens: int
    max_objects: int
    segmentation: Part = "auto"
    depth: Part = "auto"

    @property
    def longest_block(self) -> int:
        """The most tokens that may stand before the text."""
        return (self.segmentation != "off") * self.max_objects + (self.depth != "off") * (self.tokens + 2)

    def allowed(self, state: State) -> Allowed:
        """The kinds of token that may follow `state`."""
        match state.phase:
            case Phase.CODES:
                return Allowed(codes=True)
            case Phase.DEPTH_END:
                return Allowed(depth_end=True)
            case Phase.TEXT:
                return Allowed(text=True)
            case Phase.OBJECTS:
                enough = state.objects > 0 or self.segmentation != "on"
                return Allowed(
                    seg=self.segmentation != "off" and state.objects < self.max_objects,
                    depth_start=enough and self.depth != "off",
                    text=enough and self.depth != "on",
                )

    def advance(self, state: State, token_id: int) -> State:
        """The state after one more token; raises ValueError where the grammar does not allow it."""
        kind, allowed = self._kind(token_id), self.allowed(state)
        if not getattr(allowed, kind):
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
                return State(Phase.TEXT, state.objects, state.codes, depth_done=True)
            case _:
                return State(Phase.TEXT, state.objects, state.codes, state.depth_done)

    def parse(self, ids: Sequence[int]) -> Reply:
        """The reply in `ids` (without the prompt, without what follows the end of turn).

        Never raises on what a model wrote, and never mends it: the first violation goes into `problem`, and nothing
        behind it is read. Codes are given where their block is whole, and only there.
        """
        state, problem, text = State(), "", []
        for position, token_id in enumerate(ids):
            try:
                state = self.advance(state, token_id)
            except ValueError as error:
                problem = f"position {position}: {error}"
                break
            if state.phase is Phase.TEXT and token_id != self.vocabulary.depth_end_id:
                text.append(token_id)
        if not problem and state.phase in (Phase.CODES, Phase.DEPTH_END):
            problem = f"the depth block ends after {state.codes} of {self.tokens} codes"
        if not problem and state.phase is Phase.OBJECTS and not self.allowed(state).text:
            problem = "the reply ends before a demanded part"
        end = state.objects + 1 + state.codes
        codes = self.vocabulary.codes_of_ids(ids[end - state.codes : end]) if state.depth_done else []
        return Reply(state.objects, tuple(codes), tuple(text), problem)

    def _kind(self, token_id: int) -> str:
        vocabulary = self.vocabulary
        if token_id in vocabulary.code_ids:
            return "codes"
        named = {
            vocabulary.seg_id: "seg",
            vocabulary.depth_start_id: "depth_start",
            vocabulary.depth_end_id: "depth_end",
        }
        return named.get(token_id, "text")
