"""A plan as a file for the orchestrators under deploy/: replica counts, stages and limits.

In: a cluster. Out: YAML text. Each kind of worker runs as the deployment of its first stage, which
is told to host the others as well; deployments that the plan does without get no replicas. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from services.planner.cluster import Cluster
from shared.messages.control import STAGES, Role
from shared.runtime.topology import Stages

DEPLOYMENTS = {Role.ENCODE: "encoder", Role.PREFILL: "prefill", Role.DECODE: "decode"}
"""What runs a worker of one stage, in deploy/."""

K8S_FLAGS = ("--metrics-port", "9100", "--metrics-host", "0.0.0.0", "--drain-s", "40")
"""What the workers under deploy/k8s/ are told beside their stages."""

FORMATS = ("compose", "kustomize")


@dataclass(frozen=True, slots=True)
class Deployment:
    """How many replicas of one deployment there should be, and what each hosts."""

    name: str
    replicas: int
    stages: Stages
    environment: Mapping[str, str]

    @property
    def command(self) -> tuple[str, ...]:
        """What follows `triptych` on the command line."""
        if len(self.stages) == 1:
            return (self.name,)
        return ("worker", "--stages", ",".join(self.stages))


def deployments(cluster: Cluster, kv_bytes_per_token: int) -> tuple[Deployment, ...]:
    """One for each stage, in the order of a request's life.

    A topology in which a stage leads two kinds of workers has no such form: `ValueError`.
    """
    leads: dict[Role, Stages] = {}
    for stages in cluster.workers:
        if leads.setdefault(stages[0], stages) != stages:
            raise ValueError(f"{cluster.topology}: two kinds of workers begin with {stages[0]}")
    return tuple(_deployment(role, leads.get(role), cluster, kv_bytes_per_token) for role in STAGES)


def as_yaml(cluster: Cluster, kv_bytes_per_token: int, form: str) -> str:
    """The file's text; `form` is one of `FORMATS`."""
    plan = deployments(cluster, kv_bytes_per_token)
    lines = _compose(plan) if form == "compose" else _kustomize(plan)
    return f"# triptych plan: {cluster.topology}\n" + "\n".join(lines) + "\n"


def _deployment(
    role: Role, stages: Stages | None, cluster: Cluster, kv_bytes_per_token: int
) -> Deployment:
    if stages is None:
        return Deployment(DEPLOYMENTS[role], 0, (role,), {})
    limits = cluster.limits
    environment = {}
    if {Role.PREFILL, Role.DECODE} & set(stages):
        kv_bytes = limits.num_blocks * limits.block_size * kv_bytes_per_token
        environment["TRIPTYCH_KV_BYTES"] = str(kv_bytes)
    if Role.PREFILL in stages:
        environment["TRIPTYCH_MAX_BATCH_TOKENS"] = str(limits.max_batch_tokens)
    if Role.DECODE in stages:
        environment["TRIPTYCH_MAX_BATCH"] = str(limits.max_batch)
    replicas = sum(each == stages for each in cluster.workers)
    return Deployment(DEPLOYMENTS[role], replicas, stages, environment)


def _compose(plan: tuple[Deployment, ...]) -> Iterator[str]:
    yield "# docker compose -f deploy/compose.yaml -f THIS_FILE up"
    yield "services:"
    for each in plan:
        yield f"  {each.name}:"
        yield f"    command: {json.dumps(each.command)}"
        yield f"    deploy: {json.dumps({'replicas': each.replicas})}"
        if each.environment:
            yield f"    environment: {json.dumps(each.environment)}"


def _kustomize(plan: tuple[Deployment, ...]) -> Iterator[str]:
    yield "# as deploy/k8s/kustomization.yaml: kubectl apply -k deploy/k8s"
    yield "apiVersion: kustomize.config.k8s.io/v1beta1"
    yield "kind: Kustomization"
    yield "resources: [nats.yaml, gateway.yaml, encoder.yaml, prefill.yaml, decode.yaml]"
    yield "replicas:"
    for each in plan:
        yield f"  - {json.dumps({'name': each.name, 'count': each.replicas})}"
    yield "patches:"
    for each in plan:
        container = {
            "name": each.name,
            "args": [*each.command, *K8S_FLAGS],
            "env": [{"name": name, "value": value} for name, value in each.environment.items()],
        }
        yield "  - patch: |-"
        yield "      apiVersion: apps/v1"
        yield "      kind: Deployment"
        yield f"      metadata: {json.dumps({'name': each.name})}"
        yield f"      spec: {json.dumps({'template': {'spec': {'containers': [container]}}})}"
