"""The `triptych` command picks its subcommand."""

import importlib.util

import pytest

from services import cli


@pytest.mark.parametrize("argv", [[], ["--help"], ["help"]])
def test_help_names_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(argv)
    out = capsys.readouterr().out
    assert all(f"  {command} " in out for command in (*cli.COMMANDS, "version"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["version"])
    assert capsys.readouterr().out.startswith("triptych 0.")


def test_an_unknown_command_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["gatway"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "triptych: no command 'gatway' (did you mean gateway?); see triptych --help\n"
    )


@pytest.mark.parametrize("module", [module for module, _ in cli.COMMANDS.values()])
def test_every_command_has_its_module(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


def test_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(cli.importlib, "import_module", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main(["decode"])
    assert caught.value.code == 1
    assert "the package torch is missing: pip install 'triptych[worker,ucx-cu12]'" in (
        capsys.readouterr().err
    )
