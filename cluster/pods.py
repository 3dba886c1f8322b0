"""Ray clusters as KubeRay describes them: the head, the worker groups, and the pods that both are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.settings import NodeGroup, Settings

RECIPE_FOLDER = "/etc/perceptio"
RECIPE = f"{RECIPE_FOLDER}/recipe.yaml"
WEIGHTS = "/weights"
WEIGHTS_CLAIM = "perceptio-weights"
IDLE_S = 120  # before a node without work is given back

Yaml = dict[str, Any]


@dataclass(frozen=True)
class Workers:
    """A worker group of a cluster: its pods' shape, and how many there are."""

    name: str
    group: NodeGroup
    least: int
    most: int


def ray_cluster(settings: Settings, config: str, workers: Workers, *, grows: bool) -> Yaml:
    """The spec of a RayCluster: a head that only directs, and one group of workers.

    config names the ConfigMap with the recipe. Where `grows` is false, all workers start at once and stay.
    """
    least = workers.least if grows else workers.most
    spec: Yaml = {
        "rayVersion": settings.ray_version,
        "authOptions": {"mode": "token", "secretName": settings.secrets.ray_token},
        "enableInTreeAutoscaling": grows,
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},
            "template": _pod(settings, config, "ray-head", settings.head, api_token=grows),
        },
        "workerGroupSpecs": [
            {
                "groupName": workers.name,
                "replicas": least,
                "minReplicas": least,
                "maxReplicas": workers.most,
                "rayStartParams": {},
                "template": _pod(settings, config, "ray-worker", workers.group, api_token=False),
            }
        ],
    }
    if grows:
        spec["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": IDLE_S,
            "securityContext": _locked(read_only=False),
        }
    return spec


def submitter(settings: Settings) -> Yaml:
    """The pod that hands a job to its cluster and follows the log; KubeRay adds the command and the token."""
    small = {"cpu": "500m", "memory": "512Mi"}
    container = {
        "name": "submitter",
        "image": settings.image,
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": {"requests": small, "limits": small},
        "securityContext": _locked(read_only=True),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    volumes = [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}]
    spec = {"restartPolicy": "Never", **_identity(settings, api_token=False), "containers": [container]}
    return {"spec": {**spec, "volumes": volumes}}


def _pod(settings: Settings, config: str, name: str, group: NodeGroup, *, api_token: bool) -> Yaml:
    resources: Yaml = {
        "cpu": str(group.cpus),
        "memory": f"{group.memory_gb}Gi",
        "ephemeral-storage": f"{group.disk_gb}Gi",
    }
    if group.gpus:
        resources[group.gpu_resource] = str(group.gpus)
    container: Yaml = {
        "name": name,
        "image": settings.image,
        "env": _environment(settings),
        "resources": {"requests": resources, "limits": resources},
        "securityContext": _locked(read_only=True),
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True},
            {"name": "weights", "mountPath": WEIGHTS, "readOnly": True},
        ],
    }
    if settings.secrets.storage:
        container["envFrom"] = [{"secretRef": {"name": settings.secrets.storage}}]
    spec: Yaml = {
        **_identity(settings, api_token=api_token),
        "containers": [container],
        "volumes": [
            {"name": "tmp", "emptyDir": {"sizeLimit": f"{group.disk_gb}Gi"}},
            {"name": "recipe", "configMap": {"name": config}},
            {"name": "weights", "persistentVolumeClaim": {"claimName": WEIGHTS_CLAIM, "readOnly": True}},
        ],
    }
    if group.node_selector:
        spec["nodeSelector"] = dict(group.node_selector)
    if group.tolerate:
        spec["tolerations"] = [{"key": key, "operator": "Exists"} for key in group.tolerate]
    return {"spec": spec}


def _environment(settings: Settings) -> list[Yaml]:
    values = {
        "HOME": "/tmp",  # caches of libraries go where the file system may be written
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HOME": f"{WEIGHTS}/hub",
        "HF_HUB_OFFLINE": "1",
        **settings.env,
    }
    return [{"name": name, "value": value} for name, value in values.items()]


def _identity(settings: Settings, *, api_token: bool) -> Yaml:
    """Who a pod is: its account, and a user without rights. Only the autoscaler speaks to Kubernetes."""
    who: Yaml = {
        "serviceAccountName": settings.service_account,
        "automountServiceAccountToken": api_token,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": settings.user_id,
            "runAsGroup": settings.user_id,
            "fsGroup": settings.user_id,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if settings.secrets.image_pull:
        who["imagePullSecrets"] = [{"name": settings.secrets.image_pull}]
    return who


def _locked(*, read_only: bool) -> Yaml:
    locked: Yaml = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return {**locked, "readOnlyRootFilesystem": True} if read_only else locked
