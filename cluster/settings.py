"""The platform's side of a rendering: image, node groups, names of secrets. The recipe says all the rest.

Every field has the value that the shipped manifests were rendered with; a team writes a YAML file of what differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from schemas.recipe import Positive, RecipeError, Section

DnsName = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]


class NodeGroup(Section):
    """Pods of one shape: each takes most of a node of its kind."""

    cpus: Positive
    memory_gb: Positive
    disk_gb: Positive = Field(description="of the node's own disk, for temporary files and spilled objects")
    gpus: Annotated[int, Field(ge=0)] = 0
    gpu_resource: str = "nvidia.com/gpu"
    node_selector: dict[str, str] = Field(default={}, description="labels of the nodes, as the platform sets them")
    tolerate: tuple[str, ...] = Field(default=(), description="keys of taints that these pods accept")


class SecretNames(Section):
    """Names of Kubernetes secrets; their contents are never seen here."""

    ray_token: DnsName = Field(default="perceptio-ray-token", description="key auth_token: who may speak to Ray")
    redis: DnsName = Field(default="perceptio-redis", description="key password: of the service's Redis")
    storage: DnsName | None = Field(default=None, description="AWS_* variables, where no role gives access to S3")
    image_pull: DnsName | None = None


class Settings(Section):
    image: str = Field(default="perceptio:0.1.0", description="built from cluster/Dockerfile")
    ray_version: str = Field(default="2.60.0", description="that of the image; KubeRay asks for it")
    namespace: DnsName = "perceptio"
    service_account: DnsName = Field(default="perceptio", description="its role reads and writes the recipe's root")
    secrets: SecretNames = SecretNames()
    env: dict[str, str] = Field(default={}, description="e.g. AWS_ENDPOINT_URL of a store that is not Amazon's")
    queue: DnsName | None = Field(default=None, description="Kueue's local queue; turns autoscaling of jobs off")
    storage_class: str | None = Field(default=None, description="of the weights' volume; None is the cluster's own")
    weights_gb: Positive = 50
    redis_address: str = "redis:6379"
    user_id: Positive = Field(default=1000, description="that the image runs as")
    deadline_hours: Positive = Field(default=48, description="a job is ended after it")
    train_deadline_hours: Positive = 240

    head: NodeGroup = NodeGroup(cpus=4, memory_gb=16, disk_gb=50)
    cpu: NodeGroup = NodeGroup(cpus=15, memory_gb=56, disk_gb=100)
    spot: NodeGroup = NodeGroup(
        cpus=7,
        memory_gb=28,
        disk_gb=100,
        gpus=1,
        node_selector={"perceptio/nodes": "spot"},
        tolerate=("nvidia.com/gpu", "perceptio/spot"),
    )
    training: NodeGroup = NodeGroup(
        cpus=90,
        memory_gb=900,
        disk_gb=500,
        gpus=8,
        node_selector={"perceptio/nodes": "training"},
        tolerate=("nvidia.com/gpu",),
    )
    serving: NodeGroup = NodeGroup(
        cpus=7,
        memory_gb=28,
        disk_gb=100,
        gpus=1,
        node_selector={"perceptio/nodes": "serving"},
        tolerate=("nvidia.com/gpu",),
    )


def load_settings(path: Path | None) -> Settings:
    """The settings in a YAML file of what differs from the shipped ones; the shipped ones for None.

    A node group that is named is given whole. Raises RecipeError for a missing file, an unknown key or a wrong value.
    """
    if path is None:
        return Settings()
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise RecipeError(f"settings file '{path}' does not exist: give a file, or leave it out") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"settings file '{path}' is not YAML: {error}") from error
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(f"'{'.'.join(map(str, e['loc']))}' = {e['input']!r}: {e['msg']}" for e in error.errors())
        raise RecipeError(f"settings file '{path}': {problems}") from error
