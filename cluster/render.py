"""A recipe and the platform's settings as files for KubeRay 1.7: the same recipe gives the same bytes.

One RayJob per stage, each with a cluster of its own that holds the nodes which that stage needs; a RayService; the
recipe itself; and the script that runs the jobs in order. Stages are named by their commands, nothing is imported.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.pipeline import script
from cluster.pods import RECIPE, WEIGHTS, WEIGHTS_CLAIM, Workers, Yaml, ray_cluster, submitter
from cluster.settings import NodeGroup, Settings
from schemas.recipe import PoolRecipe, Recipe, RecipeError

STAGES = ("ingest", "depth", "masks", "codebook", "tokenize", "assemble", "train", "evaluate")
FENCED = ("ingest", "depth", "masks", "tokenize", "assemble")  # stages whose shards only one attempt can commit
RETRIES = 2
LONGEST_NAME = 47  # of a RayJob or RayService: KubeRay adds to it and must stay below Kubernetes' 63
APPLICATION = "workflows.serve:build"  # builds the Serve application from {"recipe": path}
SERVE_PORT = 8000  # KubeRay's probes and service expect it inside the pods; `serve.port` is for a plain machine
KEEP_S = 300  # a finished job's cluster stays so long, for a look at its dashboard

WHY = {  # a comment above the first line of a file that has the key
    "authOptions": "every call to Ray carries this secret's token; KubeRay hands it to all pods",
    "backoffLimit": "each retry gets a new cluster and may overlap the old one: only stages that fence may have any",
    "activeDeadlineSeconds": "a job that hangs must not hold its nodes for ever",
    "shutdownAfterJobFinishes": "nodes go back when the job ends, whether it did well or not",
    "entrypoint": "what is committed is skipped, so that starting it again finishes it",
    "enableInTreeAutoscaling": "Ray asks for nodes as its actors need them; Kueue needs a fixed size instead",
    "num-cpus": "the head runs no work: what kills a worker leaves it standing",
    "readOnlyRootFilesystem": "only /tmp may be written",
    "HF_HUB_OFFLINE": "weights come from the volume: a job never waits for a model hub",
    "gcsFaultToleranceOptions": "the service outlives its head: the cluster's state lies in Redis",
    "excludeHeadPodFromServeSvc": "the head has no replicas: requests go to workers alone",
    "upgradeStrategy": "a new version is up before the old one goes",
    "immutable": "a run under way must not see another recipe; a changed one gets another name",
    "ReadWriteMany": "filled once, then mounted read-only by every pod",
}


def render(recipe: Recipe, settings: Settings) -> dict[str, str]:
    """The text of every file by name. Raises RecipeError where recipe and settings cannot run on a cluster."""
    _check_places(recipe)
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)
    config = f"{_name(recipe, 'recipe')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    files = {"recipe.yaml": _recipe_map(settings, config, text), "weights.yaml": _weights(settings)}
    for stage in STAGES:
        files[f"{stage}.yaml"] = _job(recipe, settings, config, stage)
    files["serve.yaml"] = _service(recipe, settings, config)
    rendered = {name: _text(name, content) for name, content in files.items()}
    return rendered | {"pipeline.sh": script(settings.namespace, _name(recipe, ""), STAGES)}


def write(files: dict[str, str], out: Path) -> None:
    """Writes rendered files into a folder, which is made if it is not there; other files in it stay."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = out / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755 if name.endswith(".sh") else 0o644)


def _job(recipe: Recipe, settings: Settings, config: str, stage: str) -> Yaml:
    labels = {"kueue.x-k8s.io/queue-name": settings.queue} if settings.queue else {}
    hours = settings.train_deadline_hours if stage == "train" else settings.deadline_hours
    spec: Yaml = {
        "entrypoint": f"perceptio {stage} --recipe {RECIPE}",
        "submissionMode": "K8sJobMode",
        "backoffLimit": RETRIES if stage in FENCED else 0,
        "activeDeadlineSeconds": hours * 3600,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEEP_S,
        "submitterPodTemplate": submitter(settings),
        "rayClusterSpec": ray_cluster(settings, config, _workers(recipe, settings, stage), grows=not settings.queue),
    }
    return _object("ray.io/v1", "RayJob", _name(recipe, stage), settings, labels) | {"spec": spec}


def _service(recipe: Recipe, settings: Settings, config: str) -> Yaml:
    serve = recipe.serve
    name, group = ("serving", settings.serving) if serve.gpus else ("cpu", settings.cpu)
    room = group.model_copy(update={"cpus": group.cpus - 1})  # one CPU of a node is for the endpoint's HTTP side
    least, most = (
        _nodes("serve", replicas, serve.cpus, serve.gpus, name, room)
        for replicas in (max(1, serve.min_replicas), serve.max_replicas)
    )
    cluster = ray_cluster(settings, config, Workers(name, group, least, most), grows=True)
    cluster["gcsFaultToleranceOptions"] = {
        "redisAddress": settings.redis_address,
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": settings.secrets.redis, "key": "password"}}},
    }
    application = {"name": "perceptio", "route_prefix": "/", "import_path": APPLICATION, "args": {"recipe": RECIPE}}
    config_v2 = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": SERVE_PORT, "request_timeout_s": 120},
        "applications": [application],
    }
    spec = {
        "upgradeStrategy": {"type": "NewCluster"},
        "excludeHeadPodFromServeSvc": True,
        "serveConfigV2": yaml.safe_dump(config_v2, sort_keys=False),
        "rayClusterConfig": cluster,
    }
    return _object("ray.io/v1", "RayService", _name(recipe, "serve"), settings) | {"spec": spec}


def _workers(recipe: Recipe, settings: Settings, stage: str) -> Workers:
    """The worker group of a stage: accelerators only where the recipe gives its actors any."""
    section = getattr(recipe, stage)
    pool: PoolRecipe | None = getattr(section, "pool", None)
    if pool is not None:
        least, most, cpus, gpus = pool.min_actors, pool.max_actors, pool.cpus, pool.gpus
    elif stage == "train":
        least, most = section.possible_workers[0], section.most_workers
        cpus, gpus = section.cpus_per_worker, section.gpus_per_worker
    else:  # `codebook` asks Ray for one CPU a worker, and for no accelerator
        least = most = section.workers
        cpus, gpus = 1.0, 0.0
    accelerated = ("training", settings.training) if stage == "train" else ("spot", settings.spot)
    name, group = accelerated if gpus else ("cpu", settings.cpu)
    fewest, all_of_them = (_nodes(stage, actors, cpus, gpus, name, group) for actors in (least, most))
    return Workers(name, group, fewest, all_of_them)


def _nodes(stage: str, actors: int, cpus: float, gpus: float, name: str, group: NodeGroup) -> int:
    """How many nodes of a group hold so many actors or workers."""
    fits = math.floor(group.cpus / cpus)
    if gpus:
        fits = min(fits, math.floor(group.gpus / gpus))
    if fits < 1:
        raise RecipeError(
            f"{stage}: one actor or worker needs {cpus:g} CPUs and {gpus:g} accelerators, a node of group '{name}' has"
            f" {group.cpus} and {group.gpus}: lower the recipe's, or give the settings larger nodes"
        )
    return math.ceil(actors / fits)


def _check_places(recipe: Recipe) -> None:
    """Raises RecipeError for what pods could not reach: they share S3 and the weights' volume, no other disk."""
    places = {"root": recipe.root}
    for source in recipe.sources:
        for field in ("path", "images"):
            if place := getattr(source, field, None):
                places[f"sources.{source.name}.{field}"] = place
    for field, place in places.items():
        if not place.startswith("s3://"):
            raise RecipeError(f"{field} '{place}' is no s3:// address: pods share no disk, so put it on S3")
    folders = {"masks.teacher": recipe.masks.teacher, "model.sam2": recipe.model.sam2}
    for field, folder in folders.items():
        if folder != "rooms" and not folder.startswith(f"{WEIGHTS}/"):
            raise RecipeError(f"{field} '{folder}' is not in {WEIGHTS}/, where pods find the weights' volume")


def _name(recipe: Recipe, part: str) -> str:
    name = f"perceptio-{recipe.name}-{part}"
    if len(name) > LONGEST_NAME or not re.fullmatch(r"[a-z][-a-z0-9]*", name):
        raise RecipeError(
            f"name '{recipe.name}' makes the job '{name}' of {len(name)} characters, expected at most {LONGEST_NAME} of"
            " a-z, 0-9 and '-': choose another name for the recipe"
        )
    return name


def _object(version: str, kind: str, name: str, settings: Settings, labels: dict[str, str] | None = None) -> Yaml:
    metadata: Yaml = {"name": name, "namespace": settings.namespace}
    metadata["labels"] = {"app.kubernetes.io/part-of": "perceptio", **(labels or {})}
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _recipe_map(settings: Settings, config: str, text: str) -> Yaml:
    return _object("v1", "ConfigMap", config, settings) | {"immutable": True, "data": {Path(RECIPE).name: text}}


def _weights(settings: Settings) -> Yaml:
    request = {"requests": {"storage": f"{settings.weights_gb}Gi"}}
    spec: Yaml = {"accessModes": ["ReadWriteMany"], "resources": request}
    if settings.storage_class:
        spec["storageClassName"] = settings.storage_class
    return _object("v1", "PersistentVolumeClaim", WEIGHTS_CLAIM, settings) | {"spec": spec}


class _Dumper(yaml.SafeDumper):
    """Long texts stand as they are, and nothing is written by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _text(name: str, content: Yaml) -> str:
    """The YAML of an object, with the reason above each line that has one."""
    dumped = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)
    return "\n".join([f"# {name}: rendered by `perceptio cluster`; change the recipe, not this", *_explained(dumped)])


def _explained(dumped: str) -> Sequence[str]:
    left, lines = dict(WHY), []
    for line in dumped.split("\n"):
        found = re.match(r"( *)(?:- )?(?:name: )?([\w-]+):?", line)
        if found and found[2] in left:
            lines.append(f"{found[1]}# {left.pop(found[2])}")
        lines.append(line)
    return lines
