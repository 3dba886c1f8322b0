"""What is rendered for a cluster: KubeRay's schemas, the operator's rules, the security baseline, the commands."""

from __future__ import annotations

import ast
import gzip
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from cluster.render import APPLICATION, FENCED, STAGES, render, write
from cluster.settings import NodeGroup, SecretNames, Settings, load_settings
from schemas.recipe import Recipe, RecipeError
from schemas.recipe_file import load_recipe
from workflows.cli import app
from workflows.runtime import MALLOC

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "workflows" / "recipes"
CRDS = ROOT / "tests" / "data" / "kuberay-1.7.0-crd-schemas.json.gz"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built in
KINDS = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(RECIPES / "cluster.yaml")


@pytest.fixture(scope="module")
def objects(recipe: Recipe) -> dict[str, Any]:
    return parsed(render(recipe, Settings()))


@pytest.fixture(scope="module")
def validators() -> dict[str, Any]:
    schemas = json.loads(gzip.decompress(CRDS.read_bytes()))
    return {kind: jsonschema.Draft202012Validator(closed(schema)) for kind, schema in schemas.items()}


def parsed(files: dict[str, str]) -> dict[str, Any]:
    return {name: yaml.load(text, LOADER) for name, text in files.items() if name.endswith(".yaml")}


def closed(schema: Any) -> Any:
    """The schema with unknown fields forbidden, and metadata as every object has it."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    done = {key: closed(value) for key, value in schema.items()}
    known = done.get("properties")
    if isinstance(known, dict) and done.get("type") == "object" and "additionalProperties" not in done:
        done["additionalProperties"] = bool(done.get("x-kubernetes-preserve-unknown-fields", False))
    if isinstance(known, dict) and known.get("metadata") == {"type": "object"}:
        labels = {"type": "object", "additionalProperties": {"type": "string"}}
        fields = {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": labels}
        known["metadata"] = {"type": "object", "properties": fields, "additionalProperties": False}
    return done


def ray_objects(objects: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, object and cluster spec of every RayJob and RayService."""
    for name, content in objects.items():
        if content["kind"] in KINDS:
            yield name, content, content["spec"][KINDS[content["kind"]]]


def pods(content: Any) -> Iterator[Any]:
    """Every pod spec in an object, wherever it stands."""
    if isinstance(content, dict):
        if "containers" in content:
            yield content
        for part in content.values():
            yield from pods(part)
    elif isinstance(content, list):
        for part in content:
            yield from pods(part)


def test_checked_in_manifests_are_what_the_shipped_recipe_renders(recipe: Recipe) -> None:
    rendered = render(recipe, Settings())
    folder = ROOT / "cluster" / "manifests"
    assert {path.name: path.read_text() for path in folder.iterdir()} == rendered, (
        "render them anew: perceptio cluster --recipe cluster --out cluster/manifests"
    )


@pytest.mark.parametrize("settings", [Settings(), Settings(queue="research")], ids=["autoscaled", "queued"])
def test_objects_fit_kuberays_schemas(recipe: Recipe, settings: Settings, validators: dict[str, Any]) -> None:
    seen = 0
    for name, content, _ in ray_objects(parsed(render(recipe, settings))):
        errors = [f"{name} {e.json_path}: {e.message}" for e in validators[content["kind"]].iter_errors(content)]
        assert not errors
        seen += 1
    assert seen == len(STAGES) + 1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "backofLimit"], 1),
        (["spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "imagee"], "x"),
        (["spec", "rayClusterSpec", "authOptions", "mode"], "tokens"),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplicas"], "8"),
        (["metadata", "label"], {}),
    ],
)
def test_the_schema_check_finds_a_wrong_field(
    objects: dict[str, Any], validators: dict[str, Any], path: list[Any], value: Any
) -> None:
    job = json.loads(json.dumps(objects["depth.yaml"]))
    place = job
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    assert not validators["RayJob"].is_valid(job)


def test_rules_of_the_operator_that_no_schema_says(objects: dict[str, Any]) -> None:
    for name, content, cluster in ray_objects(objects):
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", content["metadata"]["name"]), name
        assert len(content["metadata"]["name"]) <= 47, name
        assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0), "token authentication needs it"
        groups = [group["groupName"] for group in cluster["workerGroupSpecs"]]
        assert len(set(groups)) == len(groups), name
        for group in cluster["workerGroupSpecs"]:
            assert 0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], name
            assert group["template"]["spec"].get("restartPolicy", "Never") == "Never", "autoscaler v2"
        spec = content["spec"]
        if content["kind"] == "RayJob":
            assert spec["shutdownAfterJobFinishes"] and "deletionStrategy" not in spec
            assert spec["activeDeadlineSeconds"] > 0 and "suspend" not in spec
            assert "gcsFaultToleranceOptions" not in cluster, "a job dies with its head all the same"


def test_security_baseline(objects: dict[str, Any]) -> None:
    for name, content, cluster in ray_objects(objects):
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", name
        assert cluster["authOptions"] == {"mode": "token", "secretName": "perceptio-ray-token"}, name
        found = list(pods(content))
        assert len(found) == (3 if content["kind"] == "RayJob" else 2), name
        for pod in found:
            assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"]:
                locked = container["securityContext"]
                assert locked["readOnlyRootFilesystem"] and not locked["allowPrivilegeEscalation"]
                assert locked["capabilities"] == {"drop": ["ALL"]}
                assert container["resources"]["requests"] == container["resources"]["limits"]
                assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]


def test_secrets_are_named_and_never_held(recipe: Recipe) -> None:
    settings = Settings(secrets=SecretNames(ray_token="our-token", redis="our-redis", storage="our-keys"))
    files = render(recipe, settings)
    objects = parsed(files)
    password = objects["serve.yaml"]["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisPassword"]
    assert password == {"valueFrom": {"secretKeyRef": {"name": "our-redis", "key": "password"}}}
    for _, content, cluster in ray_objects(objects):
        assert cluster["authOptions"]["secretName"] == "our-token"
        ray_pods = [pod["containers"][0] for pod in pods(content) if pod["containers"][0]["name"] != "submitter"]
        assert all(pod["envFrom"] == [{"secretRef": {"name": "our-keys"}}] for pod in ray_pods)
    assert "kind: Secret" not in "".join(files.values())


def test_every_command_is_one_of_the_command_line(objects: dict[str, Any]) -> None:
    commands: Any = typer.main.get_command(app)
    for stage in STAGES:
        program, name, *arguments = objects[f"{stage}.yaml"]["spec"]["entrypoint"].split()
        assert (program, name) == ("perceptio", stage)
        context = commands.commands[name].make_context(name, arguments)  # raises for an option that is not there
        mounted = Path(context.params["recipe"])
        for pod in pods(objects[f"{stage}.yaml"]["spec"]["rayClusterSpec"]):
            folders = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
            assert str(mounted.parent) == folders["recipe"]
            assert {"name": "recipe", "configMap": {"name": objects["recipe.yaml"]["metadata"]["name"]}} in pod[
                "volumes"
            ]


def test_the_service_names_an_application_that_exists(objects: dict[str, Any]) -> None:
    config = yaml.safe_load(objects["serve.yaml"]["spec"]["serveConfigV2"])
    assert [application["import_path"] for application in config["applications"]] == [APPLICATION]
    module, function = APPLICATION.split(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_pods_read_the_very_recipe(recipe: Recipe, objects: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(objects["recipe.yaml"]["data"]["recipe.yaml"])
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert objects["recipe.yaml"]["immutable"]


def test_a_changed_recipe_gets_another_name(recipe: Recipe, objects: dict[str, Any]) -> None:
    other = parsed(render(recipe.model_copy(update={"seed": recipe.seed + 1}), Settings()))
    assert other["recipe.yaml"]["metadata"]["name"] != objects["recipe.yaml"]["metadata"]["name"]


def test_nodes_follow_from_actors_and_workers(recipe: Recipe, objects: dict[str, Any]) -> None:
    found = {}
    for name, _, cluster in ray_objects(objects):
        (group,) = cluster["workerGroupSpecs"]
        found[name] = (group["groupName"], group["minReplicas"], group["maxReplicas"])
    assert found == {
        "ingest.yaml": ("cpu", 1, 8),
        "depth.yaml": ("spot", 4, 32),
        "masks.yaml": ("spot", 4, 32),
        "codebook.yaml": ("cpu", 1, 1),
        "tokenize.yaml": ("spot", 4, 32),
        "assemble.yaml": ("cpu", 1, 8),
        "train.yaml": ("training", 4, 4),  # 32 workers, 8 to a node, all at once
        "evaluate.yaml": ("spot", 4, 8),
        "serve.yaml": ("serving", 1, 8),
    }


def test_a_training_that_may_shrink_gets_nodes_for_its_fewest_and_most_workers(recipe: Recipe) -> None:
    train = recipe.train.model_copy(update={"workers": (16, 32)})
    (group,) = parsed(render(recipe.model_copy(update={"train": train}), Settings()))["train.yaml"]["spec"][
        "rayClusterSpec"
    ]["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 4)


def test_a_stage_without_accelerators_gets_cpu_nodes(recipe: Recipe) -> None:
    pool = recipe.depth.pool.model_copy(update={"gpus": 0.0})
    plain = recipe.model_copy(update={"depth": recipe.depth.model_copy(update={"pool": pool})})
    (group,) = parsed(render(plain, Settings()))["depth.yaml"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["groupName"] == "cpu"
    assert "nvidia.com/gpu" not in group["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_only_stages_that_fence_are_retried(objects: dict[str, Any]) -> None:
    retried = {stage for stage in STAGES if objects[f"{stage}.yaml"]["spec"]["backoffLimit"]}
    assert retried == set(FENCED) == {"ingest", "depth", "masks", "tokenize", "assemble"}


def test_a_queue_fixes_the_size_of_jobs(recipe: Recipe) -> None:
    for _, content, cluster in ray_objects(parsed(render(recipe, Settings(queue="research")))):
        queued = content["kind"] == "RayJob"
        assert (content["metadata"]["labels"].get("kueue.x-k8s.io/queue-name") == "research") == queued
        assert cluster["enableInTreeAutoscaling"] != queued
        (group,) = cluster["workerGroupSpecs"]
        assert (group["minReplicas"] == group["maxReplicas"]) or not queued


def test_rendering_twice_gives_the_same_bytes(recipe: Recipe) -> None:
    assert render(recipe, Settings()) == render(recipe, Settings())


def test_comments_change_no_value(recipe: Recipe) -> None:
    for name, text in render(recipe, Settings()).items():
        if name.endswith(".yaml"):
            bare = "\n".join(line for line in text.split("\n") if not line.lstrip().startswith("#"))
            assert yaml.load(bare, LOADER) == yaml.load(text, LOADER)
            assert text.startswith(f"# {name}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("root=runs/here", "runs/here' is no s3:// address"),
        ("masks.teacher=weights/sam2", "masks.teacher 'weights/sam2' is not in /weights/"),
        ("name=" + "x" * 40, "at most 47"),
        ("name=Our_Run", "choose another name"),
        ("train.cpus_per_worker=100", "train: one actor or worker needs 100 CPUs"),
        ("depth.pool.gpus=2", "a node of group 'spot' has 7 and 1"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_rendered(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        render(load_recipe(RECIPES / "cluster.yaml", overrides=[override]), Settings())


def test_settings_files(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text("image: ours/perceptio:1\nspot: {cpus: 3, memory_gb: 12, disk_gb: 50, gpus: 1}\n")
    settings = load_settings(path)
    assert settings.image == "ours/perceptio:1"
    assert settings.spot == NodeGroup(cpus=3, memory_gb=12, disk_gb=50, gpus=1)
    assert load_settings(None) == Settings()
    for text, message in (("imagee: x", "imagee"), ("queue: Not A Name", "queue"), ("[1", "is not YAML")):
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_settings(path)
    with pytest.raises(RecipeError, match="does not exist"):
        load_settings(tmp_path / "none.yaml")


def test_the_image_has_the_ray_that_the_manifests_name() -> None:
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    assert locked and locked[1] == Settings().ray_version


def test_the_dockerfile_is_locked_and_without_rights() -> None:
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    last = text[text.rindex("\nFROM ") :]
    assert "--require-hashes" in text and "USER 1000:1000" in last
    assert str(Settings().user_id) in last
    assert "index-url" not in text and "://" not in text
    assert "build-essential" not in text[text.index("AS base") :]
    assert "ENV " + " ".join(f"{name}={value}" for name, value in MALLOC.items()) in text


KUBECTL = """#!/bin/sh
# kubectl's part in the script: what is applied is Complete at the second look, but for the job named in FAIL
echo "$*" >> "$STATE/log"
case "$*" in
  *"get rayjob"*)
    job=$(echo "$*" | sed 's/.*get rayjob \\([^ ]*\\).*/\\1/')
    test -e "$STATE/$job" || exit 0
    seen=$(cat "$STATE/$job")
    echo "$job:$seen"
    case "$job" in *"$FAIL") echo Failed > "$STATE/$job" ;; *) echo Complete > "$STATE/$job" ;; esac ;;
  *"delete rayjob"*) rm -f "$STATE/$(echo "$*" | sed 's/.*rayjob \\([^ ]*\\).*/\\1/')" ;;
  *"apply"*"recipe.yaml"*|*serve.yaml*) ;;
  *apply*) echo Running > "$STATE/perceptio-cluster-$(basename "$4" .yaml)" ;;
esac
"""


def run_pipeline(folder: Path, fail: str) -> tuple[int, list[str]]:
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "STATE": str(folder), "FAIL": fail, "POLL_S": "0"}
    (folder / "log").write_text("")
    done = subprocess.run(["sh", folder / "pipeline.sh"], env=environment, capture_output=True, timeout=60, check=False)
    applied = [line for line in (folder / "log").read_text().splitlines() if line.startswith("apply")]
    return done.returncode, [Path(line.split()[-1]).stem for line in applied]


def test_the_pipeline_runs_in_order_stops_at_a_failure_and_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    write(render(recipe, Settings()), tmp_path)
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    code, applied = run_pipeline(tmp_path, fail="-codebook")
    assert code == 1
    assert applied == ["weights", "ingest", "depth", "masks", "codebook"]
    code, applied = run_pipeline(tmp_path, fail="-none")
    assert code == 0
    assert applied == ["weights", *STAGES, "serve"]
    (tmp_path / "perceptio-cluster-train").write_text("Running")  # another one's: wait for it, do not start it again
    code, applied = run_pipeline(tmp_path, fail="-none")
    assert code == 0
    assert "train" not in applied
    assert len(applied) == len(STAGES) + 1
