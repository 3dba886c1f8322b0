"""The study: which arms are trained and asked, with which seeds, and what each is compared to."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from schemas.section import Section


class StudyArm(Section):
    """One variant of the method; base, data, data order and number of steps are the recipe's, the same for all."""

    name: str
    title: str = Field(description="what a reader is told")
    segmentation: bool = Field(
        description="[SEG] tokens and masks; else the expressions are answered by boxes in words"
    )
    depth: Literal["none", "plain", "objectives", "soft_merging"] = Field(
        description="no depth tokens; with plain next-token loss; with marker, token and count losses; with these and"
        " reconstruction by soft merging: the full method"
    )
    depth_after_text: bool = False
    codes: Literal["own", "oracle", "shuffled", "other"] = Field(default="own", description="see evaluate.codes")
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    against: tuple[str, ...] = Field(default=(), description="the arms that it is compared to")


class StudyRecipe(Section):
    arms: Annotated[tuple[StudyArm, ...], Field(min_length=1)]
    notes: tuple[str, ...] = Field(default=(), description="what a reader of the page must know, a paragraph each")

    @model_validator(mode="after")
    def _named(self) -> StudyRecipe:
        names = [arm.name for arm in self.arms]
        for arm in self.arms:
            if names.count(arm.name) > 1:
                raise ValueError(f"two arms are called '{arm.name}': give each a name of its own")
            if unknown := set(arm.against) - set(names):
                raise ValueError(f"arm '{arm.name}' is against {sorted(unknown)}, expected names among {names}")
            if arm.codes != "own" and arm.depth == "none":
                raise ValueError(f"arm '{arm.name}' writes no depth tokens, so codes cannot be '{arm.codes}': set own")
        return self
