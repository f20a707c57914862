"""The shape of the repository: what lies where, how long a file may be, what the prose names."""

import ast
import re
import subprocess
from pathlib import Path

TOP_LEVEL = {
    *("services", "shared", "deploy", "tests", "bench", "docs", "examples"),
    *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"),
    *("pyproject.toml", "constraints.txt", "Makefile"),
}
MAX_LINES = 400
CODE_FOLDERS = ("services", "shared", "examples", "bench")


def git_files(repository: Path, *patterns: str) -> list[Path]:
    """Tracked and new files, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=repository,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    paths = (repository / name for name in listed.split("\0") if name)
    return [path for path in paths if path.exists()]


def test_the_top_level_holds_what_a_newcomer_is_told_of(repository: Path) -> None:
    found = {path.relative_to(repository).parts[0] for path in git_files(repository)}
    assert {name for name in found if not name.startswith(".")} <= TOP_LEVEL


def test_no_file_is_too_long(repository: Path) -> None:
    lengths = {
        str(path.relative_to(repository)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in CODE_FOLDERS
        for path in git_files(repository, f"{folder}/*.py")
    }
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_nothing_is_called_utils(repository: Path) -> None:
    names = {path.stem for path in git_files(repository, "*.py")}
    assert names & {"util", "utils", "helper", "helpers", "misc", "common"} == set()


def test_every_module_says_what_it_is(repository: Path) -> None:
    silent = [
        str(path.relative_to(repository))
        for folder in CODE_FOLDERS
        for path in git_files(repository, f"{folder}/*.py")
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


SYMBOL = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.py)(?:[:]+([\w.]+))?`")


def test_what_the_architecture_page_names_exists(repository: Path) -> None:
    page = repository / "ARCHITECTURE.md"
    missing = [
        f"{path}:{symbol}"
        for path, symbol in SYMBOL.findall(page.read_text(encoding="utf-8"))
        if not exists(repository / path, symbol)
    ]
    assert missing == []


def exists(path: Path, symbol: str) -> bool:
    """Whether the module defines the symbol; `Class.method` looks inside the class."""
    if not path.is_file():
        return False
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    for name in filter(None, symbol.split(".")):
        definition = next((node for node in body if name in defined_by(node)), None)
        if definition is None:
            return False
        body = getattr(definition, "body", [])
    return True


def defined_by(node: ast.stmt) -> set[str]:
    """The names that a statement binds."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.AnnAssign):
        return {node.target.id} if isinstance(node.target, ast.Name) else set()
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


def test_the_search_for_symbols_finds_and_misses(tmp_path: Path) -> None:
    module = tmp_path / "m.py"
    module.write_text("X = 1\nY: int = 2\nclass A:\n    def f(self): ...\nasync def g(): ...\n")
    assert all(exists(module, symbol) for symbol in ("", "X", "Y", "A", "A.f", "g"))
    assert not any(exists(module, symbol) for symbol in ("Z", "A.h", "f", "X.y"))
    assert SYMBOL.findall("`a/b.py:C.d` and `a/b.py`") == [("a/b.py", "C.d"), ("a/b.py", "")]


def test_make_test_runs_every_folder_of_tests(repository: Path) -> None:
    rules = (repository / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"tests/\w+", rules))
    assert named == {
        f"tests/{path.parent.relative_to(repository / 'tests').parts[0]}"
        for path in git_files(repository, "tests/**/test_*.py")
    }
