"""The memory of a training's weights, gradients and optimizer, from configurations alone: nothing is allocated."""

from __future__ import annotations

from perceptio.model import PerceptioForConditionalGeneration
from perceptio.train.memory import count, model_states
from schemas.plan import TrainingPlan
from schemas.recipe import Recipe
from workflows import runtime
from workflows.train_engine import set_parts


def plan_training(recipe: Recipe) -> TrainingPlan:
    """Of the recipe's own model, at full size; raises OSError where a configuration cannot be read.

    `auto` precision is reckoned as fp32 weights, which it has wherever it runs.
    """
    part, train = recipe.model, recipe.train
    model = PerceptioForConditionalGeneration.of_shape(
        runtime.weights(part.base, "base"), runtime.weights(part.sam2, "segmenter"), codes=recipe.codebook.codes
    )
    set_parts(model, part)
    parameters = count(model)
    states = model_states(
        parameters,
        world=train.most_workers,
        stage=train.zero_stage,
        precision=train.precision,
        offload=train.offload,
    )
    return TrainingPlan(
        parameters=parameters.all,
        trained=parameters.trained,
        workers=train.most_workers,
        zero_stage=train.zero_stage,
        precision=train.precision,
        **states._asdict(),
    )
