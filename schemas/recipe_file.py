"""Reads a recipe's YAML: follows `extends`, applies `--set dotted.key=value`, explains what is wrong by field.

An unknown key is refused, with the nearest known one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from schemas.recipe import Recipe, RecipeError

PLACES = {"path", "images"}  # fields of a source


def load_recipe(path: Path, *, overrides: Sequence[str] = (), root: str | None = None) -> Recipe:
    """The recipe in `path`, with `extends` followed and overrides ("dotted.key=value", value in YAML) applied.

    Raises RecipeError for a missing file, broken YAML, an unknown key or a wrong value.
    """
    values = _read(path, ())
    for override in overrides:
        _assign(values, override)
    if root is not None:
        values["root"] = root
    if "root" in values:
        values["root"] = _absolute(values["root"])
    for source in values["sources"] if isinstance(values.get("sources"), list) else ():
        for key in PLACES & source.keys() if isinstance(source, dict) else ():
            source[key] = _absolute(source[key])
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{path}: " + "; ".join(_explain(error))) from error


def _absolute(place: Any) -> Any:
    """A local path from its root on, for workers have another working folder; anything else as it is."""
    local = isinstance(place, str) and place and "://" not in place
    return str((Path(place).expanduser() if place.startswith("~/") else Path(place)).resolve()) if local else place


def _read(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"recipe file '{path}' does not exist: give a file, or one of the shipped names") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe file '{path}' is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe file '{path}' holds {type(values).__name__}, expected a mapping of sections")
    base = values.pop("extends", None)
    if base is None:
        return values
    target = (path.parent / str(base)).resolve()
    if target in parents:
        raise RecipeError(f"{path}: 'extends' goes round in a circle through {target.name}")
    return _merge(_read(target, (*parents, path.resolve())), values)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _assign(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set '{override}' has no '=': write --set dotted.key=value")
    *parents, last = key.split(".")
    place: Any = values
    for part in parents:
        place = place[int(part)] if isinstance(place, list) and part.isdigit() else place.setdefault(part, {})
        if not isinstance(place, dict | list):
            raise RecipeError(f"--set {key}: '{part}' is a plain value, not a section")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {key}: '{text}' is not YAML: {error}") from error
    if isinstance(place, list):
        place[int(last)] = value
    else:
        place[last] = value


def _explain(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        where = ".".join(str(part) for part in _fields(item["loc"]))
        if item["type"] == "extra_forbidden":
            key = str(item["loc"][-1])
            near = difflib.get_close_matches(key, sorted(_keys_at(item["loc"][:-1])), n=1)
            near = near or difflib.get_close_matches(key, sorted(_known_keys(Recipe)), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            yield f"unknown key '{where}'{hint}"
        elif item["type"] == "missing":
            yield f"'{where}' is missing: it has no default, set it"
        else:
            seen = "" if isinstance(item["input"], dict | list) else f" = {item['input']!r}"
            yield f"'{where}'{seen}: {item['msg']}" if where else item["msg"]


def _fields(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The place of an error less the source's format, which pydantic puts behind its number."""
    return loc[:2] + loc[3:] if loc[:1] == ("sources",) else loc


def _keys_at(loc: tuple[int | str, ...]) -> set[str]:
    """The keys of the section that stands at a place; what is no field on the way is stepped over."""
    models: list[type[BaseModel]] = [Recipe]
    for part in loc:
        fields = [model.model_fields[part] for model in models if isinstance(part, str) and part in model.model_fields]
        models = [model for field in fields for model in _models_in(field.annotation)] or models
    return {name for model in models for name in model.model_fields}


def _known_keys(model: type[BaseModel]) -> set[str]:
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        keys.add(name)
        for part in _models_in(field.annotation):
            keys |= _known_keys(part)
    return keys


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if get_origin(annotation) in (Union, Annotated, tuple) or get_args(annotation):
        for part in get_args(annotation):
            yield from _models_in(part)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
