"""What `--values` writes: understood by compose, kustomize and the services that it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from services.decode.settings import DecodeSettings
from services.encoder.settings import EncoderSettings
from services.planner.cluster import Cluster, Limits
from services.planner.values import FORMATS, as_yaml, deployments
from services.prefill.settings import PrefillSettings
from shared.runtime.flags import settings_of
from shared.runtime.settings import load_settings
from shared.runtime.topology import parse_stages

DEPLOY = Path(__file__).parents[3] / "deploy"
SETTINGS = {"encode": EncoderSettings, "prefill": PrefillSettings, "decode": DecodeSettings}
SERVICES = {"encoder": "encode", "prefill": "prefill", "decode": "decode"}
TOPOLOGIES = ["2E 1P 3D", "1E 2PD", "2EP 1D", "1P 2ED", "3EPD", "1P 1D", "2PD"]
LIMITS = Limits(max_batch=7, max_batch_tokens=2048, num_blocks=100)


def launches(topology: str, form: str) -> dict[str, tuple[int, list[str], dict[str, str]]]:
    """Replicas, command line and variables of each deployment, read back from the file."""
    document = yaml.safe_load(as_yaml(Cluster(topology, LIMITS), 10, form))
    if form == "compose":
        return {
            name: (each["deploy"]["replicas"], each["command"], each.get("environment", {}))
            for name, each in document["services"].items()
        }
    counts = {each["name"]: each["count"] for each in document["replicas"]}
    found = {}
    for patch in (yaml.safe_load(each["patch"]) for each in document["patches"]):
        name = patch["metadata"]["name"]
        (container,) = patch["spec"]["template"]["spec"]["containers"]
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert container["name"] == name
        found[name] = (counts[name], container["args"], environment)
    return found


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_starts_exactly_the_workers_of_the_plan(topology: str, form: str) -> None:
    workers = []
    for replicas, (service, *flags), _ in launches(topology, form).values():
        stages = flags[1] if service == "worker" else SERVICES[service]
        workers += [parse_stages(stages)] * replicas
    assert sorted(workers) == sorted(Cluster(topology).workers)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_each_worker_understands_what_it_is_told(topology: str, form: str) -> None:
    for replicas, (service, *flags), environment in launches(topology, form).values():
        if not replicas:
            continue
        stages = flags[1].split(",") if service == "worker" else [SERVICES[service]]
        known: set[str] = set()
        for stage in stages:
            known |= {setting.environment for setting in settings_of(SETTINGS[stage])}
        assert set(environment) <= known
        if service != "worker":
            load_settings(SETTINGS[stages[0]], flags, service)


def test_the_limits_of_the_plan_are_set_where_they_count() -> None:
    encoder, prefill, decode = deployments(Cluster("1E 1P 1D", LIMITS), kv_bytes_per_token=10)
    kv_bytes = str(100 * 16 * 10)
    assert encoder.environment == {}
    assert prefill.environment == {
        "TRIPTYCH_KV_BYTES": kv_bytes,
        "TRIPTYCH_MAX_BATCH_TOKENS": "2048",
    }
    assert decode.environment == {"TRIPTYCH_KV_BYTES": kv_bytes, "TRIPTYCH_MAX_BATCH": "7"}


def test_only_what_lies_in_deploy_is_named() -> None:
    compose: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    assert set(launches("1E 1P 1D", "compose")) <= set(compose["services"])
    document = yaml.safe_load(as_yaml(Cluster("1E 1P 1D"), 10, "kustomize"))
    for name in document["resources"]:
        assert (DEPLOY / "k8s" / name).is_file()
    for name, (_, arguments, _) in launches("1E 1P 1D", "kustomize").items():
        deployment, *_ = yaml.safe_load_all((DEPLOY / "k8s" / f"{name}.yaml").read_text("utf-8"))
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert container["args"] == arguments


def test_two_kinds_of_workers_with_the_same_first_stage_have_no_such_form() -> None:
    with pytest.raises(ValueError, match="two kinds of workers begin with prefill"):
        deployments(Cluster("1PD 1P 1E"), 10)
