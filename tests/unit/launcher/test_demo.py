"""The demo before anything is started."""

from pathlib import Path

import pytest

from services.launcher.demo import DemoSettings, ask_command, main


def test_a_missing_picture_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--picture", "none.png"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: --picture = 'none.png': there is no such file\n"


def test_its_picture_is_found_from_any_folder() -> None:
    assert DemoSettings().picture.is_absolute()
    assert DemoSettings().picture.is_file()


def test_it_asks_as_a_user_would() -> None:
    settings = DemoSettings(picture=Path("a.png"), question="Why?")
    command = ask_command(settings, "http://h:1")
    assert command[-5:] == ("ask", "a.png", "Why?", "--url", "http://h:1")
    assert settings.port == 0
