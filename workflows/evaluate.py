"""Asks the trained model about held-out images, and scores what it says beside what needs no understanding.

    perceptio evaluate --recipe rooms

Reads   samples/, images/, depth/ of the held-out sources, samples/ of the others (for blind guesses), codebook/, model/
Writes  eval/NAME/PASS.parquet (what was said), eval/NAME/metrics.json, eval/NAME/marks.parquet (figures by scene) and
        their manifest, eval/metrics.json (a copy)
Needs   CPUs or accelerators for evaluate.pool

NAME is the model's digest and that of everything else that the figures depend on. Each pass asks every model the same
way: `model` (grammar on), `free` (grammar off, fewer questions), `blank` (the image removed), and the untrained start
in `untrained` and `untrained_free`. A free pass is scored by its tokens: no masks are made of it. A pass whose
predictions stand is not asked again. The model is asked for what the mixture teaches: one that was taught no depth
tokens answers without, one without masks is asked for none.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch
from rich.console import Console
from rich.progress import track

from perceptio.data.images import ImageLimits, decode
from perceptio.data.masks import masks_to_rle
from perceptio.data.template import DEPTH_PROMPTS
from perceptio.depth.codec import DepthCodec
from perceptio.generate import Perceiver, Perception
from perceptio.processor import Request
from schemas.manifest import FileEntry, Manifest
from schemas.recipe import Recipe
from schemas.tables import FIGURE_MARKS, PREDICTIONS
from workflows import runtime
from workflows.commits import Table
from workflows.folders import local_copy, require
from workflows.held_out import Picture, learn_blind, read_pictures
from workflows.scores import Predictions, Score, score
from workflows.store import OtherInputsError, Root, StageError, open_root, write_manifest
from workflows.untrained import untrained

METRICS = "metrics.json"
MARKS = "marks.parquet"
GREY = 127  # value of every pixel where the image is removed
UNASKED = ("box",)  # kinds without a scorer
STORED = ImageLimits(min_side=1, max_pixels=2**31)  # what lies in the tables was checked by `ingest`
ASKS = pa.schema(
    [
        ("pass", pa.string()),
        ("id", pa.string()),
        ("turn", pa.int32()),
        ("image", pa.binary()),
        ("question", pa.string()),
        ("segmentation", pa.string()),
        ("depth", pa.string()),
        ("codes", pa.list_(pa.int32())),  # forced on the reply; null where the model writes its own
    ]
)
ANSWERS = pa.schema([ASKS.field("pass"), *PREDICTIONS])

log = logging.getLogger(__name__)
Row = dict[str, Any]


@dataclass(frozen=True)
class Pass:
    """How a set of questions is asked."""

    trained: bool
    grammar: bool
    image: bool = True


PASSES = {
    "model": Pass(trained=True, grammar=True),
    "free": Pass(trained=True, grammar=False),
    "blank": Pass(trained=True, grammar=True, image=False),
    "untrained": Pass(trained=False, grammar=True),
    "untrained_free": Pass(trained=False, grammar=False),
}


class Asker:
    """Answers batches with the trained model or the untrained start, each loaded when it is first asked."""

    def __init__(self, recipe: str) -> None:
        self.recipe = Recipe.model_validate_json(recipe)
        torch.set_num_threads(self.recipe.evaluate.pool.threads)
        self.root = open_root(self.recipe.root)
        self.perceivers: dict[bool, Perceiver] = {}

    def __call__(self, asks: pa.Table) -> pa.Table:
        """The predictions of one batch, which belongs to one pass."""
        rows = asks.to_pylist()
        name = rows[0]["pass"]
        how = PASSES[name]
        requests = [_request(row, how.image) for row in rows]
        found = self._perceiver(how.trained).perceive(
            requests,
            max_new_tokens=self.recipe.evaluate.max_new_tokens,
            use_grammar=how.grammar,
            make_parts=how.grammar,  # a free pass is scored by its tokens
        )
        answers = [_prediction(row, perception, how.grammar) for row, perception in zip(rows, found, strict=True)]
        return pa.Table.from_pylist(answers, schema=ANSWERS)

    def _perceiver(self, trained: bool) -> Perceiver:
        if trained not in self.perceivers:
            self.perceivers[trained] = self._trained() if trained else self._untrained()
            self.perceivers[trained].model.to(runtime.device())  # type: ignore[arg-type]  # its wrapper hides nn.Module.to
        return self.perceivers[trained]

    def _trained(self) -> Perceiver:
        return Perceiver.from_pretrained(str(local_copy(self.root, "model", stage="train")))

    def _untrained(self) -> Perceiver:
        """The model as training found it: the same parts, the same seed."""
        torch.manual_seed(self.recipe.seed)
        return Perceiver(*untrained(self.recipe, self.root))


def run(recipe: Recipe) -> None:
    """Writes predictions and metrics; raises StageError where an input is missing or belongs to another codebook."""
    root, began = open_root(recipe.root), time.monotonic()
    inputs = _inputs(recipe, root)
    name = f"{inputs['model'][:16]}-{hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:8]}"
    if root.manifest("eval", name) is None:
        _evaluate(recipe, root, name)
        files = tuple(_entry(root, name, file) for file in (*(f"{key}.parquet" for key in PASSES), MARKS, METRICS))
        manifest = Manifest(
            stage="evaluate",
            attempt=runtime.attempt_id(),
            recipe=recipe.digest,
            code=runtime.code_version(),
            inputs=inputs,
            licences=require(root, "model", stage="train").licences,
            files=files,
            seconds=round(time.monotonic() - began, 3),
            digest=hashlib.sha256("".join(f"{f.path} {f.sha256}\n" for f in files).encode()).hexdigest(),
        )
        write_manifest(root, manifest, "eval", name)
    else:
        log.info("evaluate: complete")
    root.write(root.read("eval", name, METRICS) or b"", "eval", METRICS)


def _inputs(recipe: Recipe, root: Root) -> dict[str, str]:
    """Digests of all that the figures depend on; raises where model, codes and codebook do not belong together."""
    codebook, model = require(root, "codebook", stage="codebook"), require(root, "model", stage="train")
    inputs = {
        "model": model.digest,
        "codebook": codebook.digest,
        "settings": runtime.settings_digest(recipe.evaluate, recipe.evaluate.pool),
        "seed": str(recipe.seed),
    }
    made_with = {"model": model.inputs["codebook"]}
    for source in recipe.sources:
        inputs[f"samples/{source.name}"] = Table(root, "samples", source.name).require().digest
        made_with[f"codes/{source.name}"] = Table(root, "codes", source.name).require().inputs["codebook"]
    for what, digest in made_with.items():
        if digest != codebook.digest:
            raise OtherInputsError(
                f"{what} was made with codebook {digest[:16]}, codebook/ is {codebook.digest[:16]}:"
                " their codes mean different depths; rebuild what is older"
            )
    return inputs


def _evaluate(recipe: Recipe, root: Root, name: str) -> None:
    held_out = [source.name for source in recipe.sources if source.held_out]
    pictures = [picture for source in held_out for picture in read_pictures(root, source, recipe.evaluate.limit)]
    if not pictures:
        raise StageError("evaluate: no held-out picture: mark a source of the recipe with `held_out: true`")
    asks = _asks(recipe, pictures)
    _ask(recipe, root, name, {key: asks[key] for key in asks if root.read("eval", name, f"{key}.parquet") is None})
    blind = learn_blind(root, [source.name for source in recipe.sources if not source.held_out])
    codec = DepthCodec.from_pretrained(local_copy(root, "codebook", stage="codebook"))
    found = score(
        pictures,
        {key: _said(root, name, key) for key in PASSES},
        blind,
        lambda codes_BN: codec.decode(torch.from_numpy(codes_BN)).numpy(),
        resamples=recipe.evaluate.bootstrap,
        seed=recipe.seed,
    )
    for key, metric in found.metrics.items():
        log.info("%s %.4f (%.4f to %.4f), baseline %s", key, metric.value, metric.low, metric.high, metric.baseline)
    _write_marks(root, name, found)
    report = {"evaluation": name, "metrics": {key: vars(metric) for key, metric in found.metrics.items()}}
    root.write(json.dumps(report, indent=1).encode(), "eval", name, METRICS)


def _asks(recipe: Recipe, pictures: Sequence[Picture]) -> dict[str, list[Row]]:
    """The questions of every pass. A picture is asked to segment once, and one question of every other kind."""
    asks: dict[str, list[Row]] = {key: [] for key in PASSES}
    scenes = list(dict.fromkeys(picture.scene for picture in pictures))
    free, blank = set(scenes[: recipe.evaluate.free]), set(scenes[: recipe.evaluate.blank])
    if recipe.evaluate.codes != "own":
        free = set()  # codes are forced by the grammar
    masks = any(entry.segmentation for entry in recipe.train.mixture)
    depth = "on" if any(entry.depth for entry in recipe.train.mixture) else "off"
    for number, picture in enumerate(pictures):
        codes = _forced(recipe, pictures, number)
        firsts = {turn["kind"]: i for i, turn in reversed(list(enumerate(picture.turns)))}
        for kind, turn in firsts.items() if picture.turns else {"": -1}.items():
            if kind in UNASKED or (kind == "referring" and not (masks and picture.masks)):
                continue  # nothing to score it with
            if kind == "" and depth == "off":
                continue  # it was taught no depth
            ask = _row(picture, turn, segmentation="on" if kind == "referring" else "off", depth=depth)
            asks["model"].append(ask | {"codes": codes})
            if kind not in ("", "referring") and picture.scene in blank:
                asks["blank"].append(ask)
            if kind in ("", "referring") and picture.scene in free:
                asks["free"].append(ask)
                asks["untrained_free"].append(ask)
            if kind == "referring":  # masks alone are compared, so the depth block is spared
                asks["untrained"].append(ask | {"depth": "off"})
    if not recipe.evaluate.untrained:
        asks |= {"untrained": [], "untrained_free": []}
    return asks


def _forced(recipe: Recipe, pictures: Sequence[Picture], number: int) -> list[int] | None:
    """The codes that evaluate.codes puts in the place of the model's own; None where they stay its own."""
    own, which = list(pictures[number].codes), recipe.evaluate.codes
    if which == "oracle":
        return own
    if which == "shuffled":
        return [int(code) for code in np.random.default_rng([recipe.seed, number]).permutation(own)]
    if which == "other":
        others = (p for p in (*pictures[number + 1 :], *pictures[:number]) if p.scene != pictures[number].scene)
        return list(next(others).codes)
    return None


def _row(picture: Picture, turn: int, *, segmentation: str, depth: str) -> Row:
    question = picture.turns[turn]["prompt"] if turn >= 0 else DEPTH_PROMPTS[0]
    row = {"id": picture.id, "turn": turn, "image": picture.image, "question": question}
    return row | {"segmentation": segmentation, "depth": depth, "codes": None}


def _ask(recipe: Recipe, root: Root, name: str, asks: Mapping[str, Sequence[Row]]) -> None:
    """Asks in fixed batches over an actor pool; a pass is written when its last batch is back."""
    batches = [batch for key, rows in asks.items() for batch in _batches(key, rows, recipe.evaluate.batch_size)]
    waiting = Counter(str(batch["pass"][0]) for batch in batches)
    for key in asks:
        if not waiting[key]:
            _write(root, name, key, [])
    if not batches:
        return
    runtime.start(recipe)
    pool, worker = recipe.evaluate.pool, Asker
    answered: dict[str, list[pa.Table]] = defaultdict(list)
    for answers in track(
        _answers(batches, worker, recipe, min(pool.max_actors, len(batches))),
        "evaluate",
        total=len(batches),
        console=Console(stderr=True),
        transient=True,
        disable=not Console(stderr=True).is_terminal,
    ):
        key = str(answers["pass"][0])
        answered[key].append(answers)
        if len(answered[key]) == waiting[key]:
            log.info("evaluate: pass %s, %d answers", key, sum(map(len, answered[key])))
            _write(root, name, key, answered.pop(key))


def _answers(batches: list[pa.Table], worker: Any, recipe: Recipe, actors: int) -> Iterator[pa.Table]:
    """One table of answers per batch, as they get done: each batch is a block, and a block one call."""
    pool = recipe.evaluate.pool
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    answers = ray.data.from_arrow(batches).map_batches(
        worker,
        fn_constructor_kwargs={"recipe": recipe.model_dump_json()},
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=min(pool.min_actors, actors), max_size=actors),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )
    yield from answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _batches(key: str, rows: Sequence[Row], size: int) -> list[pa.Table]:
    """Fixed batches of questions alike in parts and length: little padding, and all of a batch end together."""
    ordered = sorted(rows, key=lambda row: (row["segmentation"], row["depth"], len(row["question"]), row["id"]))
    parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [pa.Table.from_pylist([{"pass": key, **row} for row in part], schema=ASKS) for part in parts]


def _request(row: Row, image: bool) -> Request:
    rgb_HW3 = decode(row["image"], STORED)
    codes = None if row["codes"] is None else tuple(row["codes"])
    return Request(
        rgb_HW3 if image else np.full_like(rgb_HW3, GREY), row["question"], row["segmentation"], row["depth"], codes
    )


def _prediction(row: Row, found: Perception, grammar: bool) -> Row:
    return {
        "pass": row["pass"],
        "id": row["id"],
        "turn": row["turn"],
        "grammar": grammar,
        "text": found.text,
        "codes": list(found.reply.codes),
        "masks": masks_to_rle(found.masks_MHW) if len(found.masks_MHW) else [],
        "well_formed": found.reply.well_formed,
        "finish": found.finish,
    }


def _write(root: Root, name: str, key: str, tables: Sequence[pa.Table]) -> None:
    """Writes a pass's predictions, in an order that does not depend on which batch came back first."""
    whole = pa.concat_tables([table.cast(ANSWERS) for table in tables]) if tables else ANSWERS.empty_table()
    stream = io.BytesIO()
    pq.write_table(whole.sort_by([("id", "ascending"), ("turn", "ascending")]).select(PREDICTIONS.names), stream)
    root.write(stream.getvalue(), "eval", name, f"{key}.parquet")


def _write_marks(root: Root, name: str, found: Score) -> None:
    """Writes each figure's sums by scene, so that evaluations of several models can be compared scene by scene."""
    tables = [
        pa.Table.from_arrays(
            [
                pa.array([figure] * len(marks)).cast(pa.string()),
                pa.array([str(scene) for scene in marks.images]),
                pa.array(marks.numerator_I),
                pa.array(marks.denominator_I),
            ],
            schema=FIGURE_MARKS,
        )
        for figure, marks in found.marks.items()
    ]
    stream = io.BytesIO()
    pq.write_table(pa.concat_tables(tables) if tables else FIGURE_MARKS.empty_table(), stream)
    root.write(stream.getvalue(), "eval", name, MARKS)


def _entry(root: Root, name: str, file: str) -> FileEntry:
    data = root.read("eval", name, file)
    assert data is not None
    rows = pq.read_metadata(io.BytesIO(data)).num_rows if file != METRICS else 0
    return FileEntry(path=file, rows=rows, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _said(root: Root, name: str, key: str) -> Predictions:
    data = root.read("eval", name, f"{key}.parquet")
    assert data is not None
    return {(row["id"], row["turn"]): row for row in pq.read_table(io.BytesIO(data)).to_pylist()}
