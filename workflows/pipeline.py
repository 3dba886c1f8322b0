"""The main path, whole: from sources to a judged model.

    perceptio run --recipe rooms

| stage      | reads                     | writes        | what it is                                            |
|------------|---------------------------|---------------|-------------------------------------------------------|
| ingest     | sources                   | images/       | every image upright and hashed, with its questions    |
| depth      | images/                   | depth/        | a teacher's inverse depth of every image              |
| masks      | images/                   | masks/        | exact masks passed on, others made from boxes         |
| codebook   | depth/                    | codebook/     | a VQ-VAE that turns a depth map into N codes          |
| tokenize   | depth/, codebook/         | codes/        | every depth map as N codes                            |
| assemble   | images/, masks/, codes/   | samples/      | all that training needs of an image in one row        |
| train      | samples/, codebook/       | runs/, model/ | segmentation tokens, then depth tokens, then the text |
| evaluate   | samples/, depth/, model/  | eval/         | held-out figures beside their blind baselines         |

`perceptio serve` then answers over HTTP with ROOT/model. A stage that is complete returns at once; one that was
interrupted goes on where it stood.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from schemas.recipe import Recipe
from workflows import assemble, codebook, depth, evaluate, ingest, masks, tokenize_depth, train

DATA: dict[str, Callable[[Recipe], object]] = {
    "ingest": ingest.run,
    "depth": depth.run,
    "masks": masks.run,
    "codebook": codebook.run,
    "tokenize": tokenize_depth.run,
    "assemble": assemble.run,
}
MODEL: dict[str, Callable[[Recipe], object]] = {"train": train.run, "evaluate": evaluate.run}

log = logging.getLogger(__name__)


def run(recipe: Recipe, stages: Mapping[str, Callable[[Recipe], object]] = DATA | MODEL) -> dict[str, float]:
    """Seconds by stage, after the stages were run in order; raises StageError where one cannot go on."""
    seconds = {}
    for name, stage in stages.items():
        began = time.monotonic()
        stage(recipe)
        seconds[name] = round(time.monotonic() - began, 1)
        log.info("%s: done in %.0f s", name, seconds[name])
    return seconds
