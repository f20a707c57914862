"""Imports as they happen: what a process loads, beside what import-linter reads in the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "ucxx")


def loaded_by(module: str, repository: Path) -> set[str]:
    """Top-level packages in memory once the module is imported in a fresh process."""
    code = f"import sys, {module}\nprint(*{{name.partition('.')[0] for name in sys.modules}})\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def modules_of(package: str, repository: Path) -> list[str]:
    return sorted(
        ".".join(path.relative_to(repository).with_suffix("").parts)
        for path in (repository / package.replace(".", "/")).rglob("*.py")
        if path.stem not in ("__init__", "__main__")
    )


def test_a_running_gateway_has_no_torch(repository: Path) -> None:
    every = ", ".join(modules_of("services.gateway", repository)) or "services"
    assert loaded_by(every, repository).isdisjoint(HEAVY)


@pytest.mark.parametrize("module", ["services.launcher.up", "services.ask.command"])
def test_the_commands_have_no_torch(module: str, repository: Path) -> None:
    assert loaded_by(module, repository).isdisjoint(HEAVY)


def test_help_loads_no_subcommand(repository: Path) -> None:
    loaded = loaded_by("services.cli", repository)
    assert loaded.isdisjoint({*HEAVY, "rich", "pydantic", "httpx", "fastapi"})


@pytest.mark.parametrize(
    ("package", "home"), [("nats", "shared/bus/nats_"), ("ucxx", "shared/transport/ucx")]
)
def test_each_outside_system_is_met_in_one_place(package: str, home: str, repository: Path) -> None:
    """Covers modules that the import contracts do not list one by one."""
    elsewhere = [
        str(path.relative_to(repository))
        for folder in ("services", "shared")
        for path in (repository / folder).rglob("*.py")
        if package in imported(path) and not str(path.relative_to(repository)).startswith(home)
    ]
    assert elsewhere == []


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names
