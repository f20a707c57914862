"""The files in `deploy/` parse, and say only what the services understand."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.decode.settings import DecodeSettings
from services.encoder.settings import EncoderSettings
from services.gateway.settings import GatewaySettings
from services.launcher.nats_server import find_program
from services.prefill.settings import PrefillSettings
from shared.runtime.flags import settings_of
from shared.runtime.settings import ServiceSettings, load_settings

DEPLOY = Path(__file__).parents[3] / "deploy"
SETTINGS: dict[str, type[ServiceSettings]] = {
    "gateway": GatewaySettings,
    "encoder": EncoderSettings,
    "prefill": PrefillSettings,
    "decode": DecodeSettings,
}
YAML_FILES = sorted(path for path in DEPLOY.rglob("*.y*ml"))
NOMAD_FILES = sorted((DEPLOY / "nomad").glob("*.hcl"))

Launch = tuple[list[str], list[str]]
"""Arguments after `triptych`, and the names of the variables that are set."""


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def compose_launches() -> Iterator[Launch]:
    (compose,) = documents(DEPLOY / "compose.yaml")
    for name in SETTINGS:
        service = compose["services"][name]
        yield service["command"], list(service["environment"])


def k8s_launches() -> Iterator[Launch]:
    for name in SETTINGS:
        for document in documents(DEPLOY / "k8s" / f"{name}.yaml"):
            if document["kind"] == "Deployment":
                (container,) = document["spec"]["template"]["spec"]["containers"]
                yield container["args"], [entry["name"] for entry in container["env"]]


def nomad_launches() -> Iterator[Launch]:
    for path in NOMAD_FILES:
        text = path.read_text(encoding="utf-8")
        arguments = re.search(r"args\s+= (\[.*\])", text)
        assert arguments is not None, path
        yield json.loads(arguments[1]), re.findall(r"^ +(TRIPTYCH_\w+) ", text, re.MULTILINE)


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_yaml_parses(path: Path) -> None:
    assert all(isinstance(document, dict) for document in documents(path))


@pytest.mark.parametrize(
    "launches", [compose_launches, k8s_launches, nomad_launches], ids=["compose", "k8s", "nomad"]
)
def test_each_service_understands_its_flags_and_variables(launches: Any) -> None:
    seen = []
    for (command, *flags), variables in launches():
        cls = SETTINGS[command]
        load_settings(cls, flags, command)
        known = {setting.environment for setting in settings_of(cls)}
        assert {name for name in variables if name.startswith("TRIPTYCH_")} <= known
        seen.append(command)
    assert sorted(seen) == sorted(SETTINGS)


@pytest.mark.parametrize("path", NOMAD_FILES, ids=lambda path: path.name)
def test_nomad_jobs_are_balanced(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("{") == text.count("}") > 0


def test_nats_server_accepts_its_configuration() -> None:
    done = subprocess.run(
        [find_program(), "-t", "-c", str(DEPLOY / "nats" / "nats.conf")],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr
