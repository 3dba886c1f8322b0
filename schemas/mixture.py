"""What a training run reads, in which shares, and what it makes of it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from schemas.section import Positive, Section, Weight


class MixtureEntry(Section):
    """One task set of the mixture."""

    source: str = Field(description="name of a source of this recipe")
    name: str = Field(default="", description="what logs and the schedule call it, where its source stands here twice")
    weight: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="its share, of the sum of all weights; left out where train.temperature is set"
    )
    repeats: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="under train.temperature its rows count so often"
    )
    max_passes: Positive | None = Field(
        default=None, description="over its rows, after which the other entries share its place; none: without end"
    )
    kinds: tuple[str, ...] = Field(default=(), description="kinds of turns used; [] = all, or none for depth-only")
    segmentation: bool = Field(description="write [SEG] tokens where the record has masks")
    boxes: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="what masks would answer is asked as `Where is EXPRESSION?` and answered by boxes in words,"
        " [[x0, y0, x1, y1]] in so many parts of a side (InternVL's own: 1000)",
    )
    depth: bool = Field(description="write the depth block")
    max_turns: Annotated[int, Field(ge=0)] = 1

    @property
    def called(self) -> str:
        """Its own name, else its source's."""
        return self.name or self.source

    @model_validator(mode="after")
    def _one_answer(self) -> MixtureEntry:
        if self.segmentation and self.boxes is not None:
            raise ValueError(f"segmentation is true and boxes is {self.boxes}: an expression has one kind of answer")
        return self


class WeightChange(Section):
    """Other weights of the mixture's entries, from one step on."""

    step: Positive = Field(description="the first global batch that is drawn by them, counted from 0")
    weights: dict[str, Weight] = Field(description="of every entry by name; 0 leaves one out")
