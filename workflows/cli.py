"""The command line: `perceptio COMMAND --recipe FILE_OR_NAME [--root URI] [--set dotted.key=value ...]`.

Exit codes: 0 done, 1 the job failed, 2 wrong usage or recipe. Ray and torch are imported inside the commands, so that
help and refusals come at once.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from schemas.recipe import Recipe, RecipeError
from schemas.recipe_file import load_recipe
from workflows.logs import Format, configure

RECIPES = Path(__file__).parent / "recipes"

RecipeOption = Annotated[str, typer.Option("--recipe", help="A recipe file, or the name of a shipped one.")]
RootOption = Annotated[str | None, typer.Option("--root", help="Folder or s3:// address instead of the recipe's root.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value; may be given several times.")]

Reported = Literal["ingest", "depth", "masks", "codebook", "tokenize", "assemble"]

app = typer.Typer(
    name="perceptio",
    help="Perceptio on Ray: a vision-language model that writes down what it sees before it answers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _logs(
    log_format: Annotated[Format, typer.Option("--log-format", help="text, or json: one object a line.")] = "text",
) -> None:
    configure(log_format)


def main() -> None:
    """Runs the command line; the console script."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_ACCELERATOR_LOG_LEVEL", "ERROR")
    app()


@app.command()
def demo(root: RootOption = "runs/demo", overrides: SetOption = None) -> None:
    """The whole pipeline on rendered rooms, from nothing to a served answer and report.html."""
    _stage("demo", _load("rooms", root, overrides))


@app.command()
def run(recipe: RecipeOption = "rooms", root: RootOption = None, overrides: SetOption = None) -> None:
    """Every stage of a recipe in order; what is complete is skipped."""
    _stage("pipeline", _load(recipe, root, overrides))


@app.command()
def plan(
    as_json: Annotated[
        str | None, typer.Option("--json", help="Write it as JSON to a file, or `-` to print it.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="After a run: planned beside actual.")] = False,
    recipe: RecipeOption = "rooms",
    root: RootOption = None,
    overrides: SetOption = None,
) -> None:
    """What a run will take: rates, pools, hours, storage, requests, money; measured on a sample."""
    loaded = _load(recipe, root, overrides)
    with _job():
        planning, tables = (importlib.import_module(f"workflows.{name}") for name in ("plan", "plan_table"))
        if compare:
            tables.show_compared(planning.compare(loaded))
            return
        made = planning.run(loaded)
        if as_json == "-":
            typer.echo(made.model_dump_json(indent=1))
            return
        tables.show(made)
        if as_json is not None:
            Path(as_json).write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")


@app.command()
def ingest(recipe: RecipeOption = "rooms", root: RootOption = None, overrides: SetOption = None) -> None:
    """Images in: decoded, checked, hashed, with their questions."""
    _stage("ingest", _load(recipe, root, overrides))


@app.command()
def depth(recipe: RecipeOption = "rooms", root: RootOption = None, overrides: SetOption = None) -> None:
    """A teacher's inverse depth for every image."""
    _stage("depth", _load(recipe, root, overrides))


@app.command()
def masks(recipe: RecipeOption = "rooms", root: RootOption = None, overrides: SetOption = None) -> None:
    """Masks for every object that has only a box."""
    _stage("masks", _load(recipe, root, overrides))


@app.command()
def codebook(recipe: RecipeOption = "rooms", root: RootOption = None, overrides: SetOption = None) -> None:
    """Trains the depth codebook."""
    _stage("codebook", _load(recipe, root, overrides))


@app.command()
def tokenize(recipe: RecipeOption = "rooms", root: RootOption = None, overrides: SetOption = None) -> None:
    """Depth maps into codes."""
    _stage("tokenize_depth", _load(recipe, root, overrides))


@app.command()
def assemble(recipe: RecipeOption = "rooms", root: RootOption = None, overrides: SetOption = None) -> None:
    """Joins images, masks and codes into training samples."""
    _stage("assemble", _load(recipe, root, overrides))


@app.command()
def train(recipe: RecipeOption = "rooms", root: RootOption = None, overrides: SetOption = None) -> None:
    """Trains the model on the mixture; goes on from the last checkpoint."""
    _stage("train", _load(recipe, root, overrides))


@app.command()
def evaluate(recipe: RecipeOption = "rooms", root: RootOption = None, overrides: SetOption = None) -> None:
    """Held-out figures, each with its interval and its blind baselines."""
    _stage("evaluate", _load(recipe, root, overrides))


@app.command()
def study(
    results: Annotated[
        str | None, typer.Option("--results", help="Folder of study.html and its runs, in study/; ROOT if not given.")
    ] = None,
    recipe: RecipeOption = "rooms_study",
    root: RootOption = None,
    overrides: SetOption = None,
) -> None:
    """The method's parts, one by one: every arm trained, asked, compared; finished runs are kept."""
    loaded = _load(recipe, root, overrides)
    with _job():
        typer.echo(importlib.import_module("workflows.study").run(loaded, results))


@app.command()
def explain(
    step: Annotated[int, typer.Option("--step", help="Which global batch, counted from 0.")],
    run: Annotated[str | None, typer.Option("--run", help="A name under ROOT/runs, whose recipe is used.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Of the run, where not as in its recipe.")] = None,
    recipe: RecipeOption = "rooms",
    root: RootOption = None,
    overrides: SetOption = None,
) -> None:
    """A page with the samples of a training step, worker by worker, as they were trained on."""
    loaded = _load(recipe, root, overrides)
    with _job():
        typer.echo(importlib.import_module("workflows.explain").run(loaded, step, run, workers))


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", help="A new folder.")],
    run: Annotated[str | None, typer.Option("--run", help="A name under ROOT/runs; else the trained model.")] = None,
    step: Annotated[int | None, typer.Option("--step", help="Of which checkpoint; the last one if not given.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="LoRA apart, as peft takes it, not merged.")] = False,
    recipe: RecipeOption = "rooms",
    root: RootOption = None,
    overrides: SetOption = None,
) -> None:
    """A plain model folder of the trained model, or of any checkpoint of a run."""
    loaded = _load(recipe, root, overrides)
    with _job():
        typer.echo(importlib.import_module("workflows.export").run(loaded, out, run, step, adapter=adapter))


@app.command()
def serve(recipe: RecipeOption = "rooms", root: RootOption = None, overrides: SetOption = None) -> None:
    """Answers over HTTP with the trained model, until Ctrl-C."""
    _stage("serve", _load(recipe, root, overrides))


@app.command()
def verify(recipe: RecipeOption = "rooms", root: RootOption = None, overrides: SetOption = None) -> None:
    """Proves the tables under a root from their files: counts, ids, checksums, digests."""
    _stage("verify", _load(recipe, root, overrides))


@app.command()
def append(recipe: RecipeOption = "rooms", root: RootOption = None, overrides: SetOption = None) -> None:
    """Lists the sources again and adds what is new; the stages then do only the new shards."""
    loaded = _load(recipe, root, overrides)
    with _job():
        importlib.import_module("workflows.append").run(loaded)


@app.command()
def requeue(
    reason: Annotated[str, typer.Option("--reason", help="Why the rows were refused, e.g. missing_file.")],
    stage: Annotated[str | None, typer.Option("--stage", help="Only this stage's rows.")] = None,
    recipe: RecipeOption = "rooms",
    root: RootOption = None,
    overrides: SetOption = None,
) -> None:
    """Tries refused rows again, by reason, after what was wrong was mended."""
    loaded = _load(recipe, root, overrides)
    with _job():
        for done in importlib.import_module("workflows.requeue").run(loaded, reason, stage):
            typer.echo(f"{done.stage}: {done.tried} rows tried again, {done.refused} refused again as {reason}")
        typer.echo("Next: perceptio run, which carries on what is kept now")


@app.command()
def forget(
    ids: Annotated[list[str], typer.Argument(help="Ids of images, as in the tables' column `id`.")],
    recipe: RecipeOption = "rooms",
    root: RootOption = None,
    overrides: SetOption = None,
) -> None:
    """Takes images out of every table, for deletion requests; marks what was made from them."""
    loaded = _load(recipe, root, overrides)
    with _job():
        done = importlib.import_module("workflows.forget").run(loaded, ids)
        for table, rows in done.rows.items():
            typer.echo(f"{table}: {rows} rows taken out")
        for folder in done.marked:
            typer.echo(f"{folder}: was made from them; marked, make it anew")


@app.command()
def clean(
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it they are only shown.")] = False,
    recipe: RecipeOption = "rooms",
    root: RootOption = None,
    overrides: SetOption = None,
) -> None:
    """Removes what lost attempts left; shows it first, deletes on --yes."""
    loaded = _load(recipe, root, overrides)
    with _job():
        found = importlib.import_module("workflows.clean").run(loaded, yes=yes)
        for stray in found:
            typer.echo(f"{stray.path}  {stray.size:,} bytes: {stray.why}")
        verb = "deleted" if yes else "may go: add --yes to delete them"
        typer.echo(f"{len(found)} files, {sum(stray.size for stray in found):,} bytes, {verb}")


@app.command()
def report(
    stage: Annotated[Reported, typer.Argument(help="The stage to report on.")],
    recipe: RecipeOption = "rooms",
    root: RootOption = None,
    overrides: SetOption = None,
) -> None:
    """A page about one data stage: counts, histograms, pictures, refused rows by reason."""
    loaded = _load(recipe, root, overrides)
    with _job():
        typer.echo(importlib.import_module("workflows.stage_report").run(loaded, stage))


@app.command()
def doctor(
    recipe: RecipeOption = "rooms",
    root: RootOption = None,
    overrides: SetOption = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Check what accelerators do instead, by doing it.")] = False,
) -> None:
    """Checks the machine: versions, CPUs, memory, disk, port, store; says what is missing."""
    _stage("doctor_gpu" if gpu else "doctor", _load(recipe, root, overrides))


@app.command()
def rooms(
    out: Annotated[Path, typer.Option("--out", help="Empty folder to write to.")],
    count: Annotated[int, typer.Option("--count", min=1, help="Number of rooms.")] = 100,
    size: Annotated[int, typer.Option("--size", min=32, help="Image side in pixels.")] = 224,
    seed: Annotated[int, typer.Option("--seed", help="Layout seed.")] = 0,
) -> None:
    """Renders rooms into a folder, in the layout of COCO and RefCOCO."""
    recipe = _load("rooms", None, None)
    with _job():
        importlib.import_module("workflows.rooms").write(recipe, out, count=count, size=size, seed=seed)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of an InternVL2.5, or SAM2's .pt, as its authors publish it.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")],
    processor: Annotated[
        str | None, typer.Option("--processor", help="Folder or hub id to take tokenizer and image processor from.")
    ] = None,
) -> None:
    """Weights as their authors publish them into a folder that a recipe takes: InternVL2.5, SAM2."""
    with _job():
        from workflows.store import StageError

        try:
            if source.suffix == ".pt":
                sam2 = importlib.import_module("perceptio.segmentation.sam2_image")
                sam2.Sam2ImageModel.from_official(source).save_pretrained(out)
            else:
                importlib.import_module("perceptio.vlm.original").convert_folder(source, out, processor=processor)
        except (OSError, RuntimeError, ValueError) as error:
            raise StageError(f"convert: {error}") from error


@app.command()
def cluster(
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")],
    recipe: RecipeOption = "cluster",
    root: RootOption = None,
    overrides: SetOption = None,
    settings: Annotated[Path | None, typer.Option("--settings", help="YAML of what differs from the defaults.")] = None,
) -> None:
    """Renders RayJob and RayService YAML for Kubernetes from a recipe."""
    from cluster.render import render, write
    from cluster.settings import load_settings

    loaded = _load(recipe, root, overrides)
    try:
        write(render(loaded, load_settings(settings)), out)
    except RecipeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


@app.command()
def schema() -> None:
    """Prints the recipe's JSON Schema, for editors."""
    typer.echo(json.dumps(Recipe.model_json_schema(), indent=1))


def _stage(module: str, recipe: Recipe) -> None:
    """Runs the stage of that module; a stage's file is named for it."""
    with _job():
        importlib.import_module(f"workflows.{module}").run(recipe)


@contextmanager
def _job() -> Iterator[None]:
    """Ends the process with 1 and one message where a job cannot go on; other errors show where they came from."""
    from workflows.store import StageError

    try:
        yield
    except StageError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except Exception as error:
        logging.exception("unexpected: %s: %s", type(error).__name__, error)
        raise typer.Exit(1) from None


def _load(recipe: str, root: str | None, overrides: list[str] | None) -> Recipe:
    """The recipe of a command; ends the process with 2 and one message where it cannot be used."""
    try:
        return load_recipe(_path(recipe), overrides=overrides or [], root=root)
    except RecipeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _path(recipe: str) -> Path:
    """The file of a recipe that is given as a file or as the name of a shipped one."""
    shipped = RECIPES / f"{recipe}.yaml"
    given = Path(recipe)
    if given.exists() or given.suffix or given.parent != Path() or shipped.exists():
        return shipped if shipped.exists() and not given.is_file() else given
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise RecipeError(f"recipe '{recipe}' is neither a file nor a shipped recipe; shipped: {known}")


if __name__ == "__main__":
    main()
