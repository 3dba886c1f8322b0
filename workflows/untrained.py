"""The model that a run starts from: the recipe's base and SAM2 with the run's codebook.

Training starts here; the evaluation asks it too, to say what training was worth.
"""

from __future__ import annotations

from perceptio.model import PerceptioForConditionalGeneration
from perceptio.processor import PerceptioProcessor
from schemas.recipe import Recipe
from workflows import runtime
from workflows.folders import local_copy
from workflows.store import Root


def untrained(recipe: Recipe, root: Root) -> tuple[PerceptioForConditionalGeneration, PerceptioProcessor]:
    """Model and processor; the same for the same recipe after `torch.manual_seed`, which draws the mask projector."""
    part = recipe.model
    return PerceptioForConditionalGeneration.from_parts(
        runtime.weights(part.base, "base"),
        runtime.weights(part.sam2, "segmenter"),
        local_copy(root, "codebook", stage="codebook"),
        max_objects=part.max_objects,
        depth_after_text=part.depth_after_text,
        starts_as=part.starts_as,
        embedding_noise=part.embedding_noise,
        prompts_start_as_clicks=part.prompts_start_as_clicks,
    )
