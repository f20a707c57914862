"""`triptych plan` from the command line to its tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from services.planner.command import main
from services.planner.fit import Fit
from services.planner.perf_model import PerformanceModel
from services.planner.report import replicas


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    model = PerformanceModel(
        encode=Fit(coefficients=(0.01, 0.002)),
        prefill=Fit(coefficients=(0.01, 0.0001, 0.0)),
        decode=Fit(coefficients=(0.005, 0.0, 0.0001)),
        kv_bytes_per_token=1024,
        embedding_bytes_per_patch=512,
    )
    profile, trace = tmp_path / "profile.json", tmp_path / "trace.jsonl"
    profile.write_text(model.model_dump_json(), encoding="utf-8")
    line = '{"arrival_s": %d, "num_prompt_tokens": 300, "num_output_tokens": 8, "patches": [256]}'
    trace.write_text("\n".join(line % n for n in range(20)), encoding="utf-8")
    return ["--trace", str(trace), "--profile", str(profile), "--slo", "ttft=1,tpot=0.05"]


def test_prints_the_best_plan_and_how_to_start_it(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main([*files, "--workers", "3"])
    out = capsys.readouterr().out
    assert "best plans" in out
    assert "100.0%" in out
    # The tower takes most of the time, and only workers that hold it can share it.
    assert 'triptych up --topology "3EPD"' in out


def test_writes_a_plot_and_the_values_of_the_best_plan(files: list[str], tmp_path: Path) -> None:
    plot, values = tmp_path / "plan.svg", tmp_path / "plan.yaml"
    main([*files, "--workers", "3", "--plot", str(plot), "--values", str(values)])
    assert "<!-- 3EPD -->" in plot.read_text("utf-8")
    assert yaml.safe_load(values.read_text("utf-8"))["services"]["encoder"] == {
        "command": ["worker", "--stages", "encode,prefill,decode"],
        "deploy": {"replicas": 3},
        "environment": {
            "TRIPTYCH_KV_BYTES": str(4096 * 16 * 1024),
            "TRIPTYCH_MAX_BATCH_TOKENS": "4096",
            "TRIPTYCH_MAX_BATCH": "64",
        },
    }


def test_a_load_that_nothing_attains_has_a_plot_all_the_same(
    files: list[str], tmp_path: Path
) -> None:
    plot = tmp_path / "plan.svg"
    hopeless = [*files[:-1], "ttft=0.001,tpot=0.05"]
    main([*hopeless, "--workers", "1", "--plot", str(plot)])
    assert "<!-- 1EPD -->" in plot.read_text("utf-8")


def test_stages_with_workers_of_their_own_are_scaled() -> None:
    assert replicas("2E 1P 3D").splitlines() == [
        "docker compose -f deploy/compose.yaml up --scale encoder=2 --scale prefill=1 "
        "--scale decode=3",
        "kubectl scale deployment/encoder --replicas=2",
        "kubectl scale deployment/prefill --replicas=1",
        "kubectl scale deployment/decode --replicas=3",
    ]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--workers", "0"], "--workers = 0: should be at least 1"),
        (["--workers", "99"], "--workers = 99: at most 16 are allowed"),
        (["--cores", "-1"], "--cores = -1: should be 0 or more"),
        (["--beta", "-1"], "--beta = -1.0: should be 0 or more"),
        (["--slo", "ttft=2"], "both ttft and tpot are needed"),
        (["--profile", "/none"], "--profile = /none: cannot be read"),
        (["--plot", "plan.jpg"], "--plot = plan.jpg: should end with .png or .svg"),
        (["--values", "/none/v.yaml"], "--values = /none/v.yaml: there is no folder /none"),
        (["--values", "/"], "cannot be written: Is a directory"),
        (["--wrkers", "2"], "did you mean --workers"),
    ],
)
def test_what_is_wrong_is_named(
    files: list[str], given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*files, *given])
    assert told in capsys.readouterr().err
