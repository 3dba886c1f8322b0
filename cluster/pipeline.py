"""The script that runs a recipe's RayJobs in order: kubectl alone, since the stages themselves know what is done."""

from __future__ import annotations

from collections.abc import Sequence

SCRIPT = """\
#!/bin/sh
# Every stage in order, each as a RayJob that is waited for; the service last. Rendered by `perceptio cluster`.
# Safe to start again: a job under way is waited for, a finished one runs anew and skips what is committed.
set -eu
cd "$(dirname "$0")"

status() {
  kubectl -n @namespace get rayjob "$1" --ignore-not-found -o 'jsonpath={.metadata.name}:{.status.jobDeploymentStatus}'
}

# --server-side: what KubeRay's kinds hold is too long for the annotation that a plain apply leaves
kubectl apply --server-side -f recipe.yaml -f weights.yaml
for stage in @stages; do
  job=@prefix$stage
  before=$(status "$job")
  case "$before" in
    "" | *:Complete | *:Failed | *:ValidationFailed)
      kubectl -n @namespace delete rayjob "$job" --ignore-not-found --wait
      kubectl apply --server-side -f "$stage.yaml"
      ;;
  esac
  echo "$job: waiting"
  while :; do
    now=$(status "$job") || now=unknown # the next look may reach the cluster again
    case "$now" in
      *:Complete) break ;;
      *:Failed | *:ValidationFailed | "")
        echo "$job: ${now:-deleted}; see: kubectl -n @namespace describe rayjob $job" >&2
        exit 1
        ;;
    esac
    sleep "${POLL_S:-20}"
  done
done
kubectl apply --server-side -f serve.yaml
"""


def script(namespace: str, prefix: str, stages: Sequence[str]) -> str:
    """The script for jobs of these names: prefix and stage; each stage's file is named for it."""
    text = SCRIPT.replace("@namespace", namespace).replace("@prefix", prefix)
    return text.replace("@stages", " ".join(stages))
