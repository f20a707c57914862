"""`triptych profile` measures the real executors and writes what `triptych plan` reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from services.planner.command import main as plan
from services.planner.perf_model import PerformanceModel
from services.planner.profiling.command import main as profile
from shared.demo import model_dir

FLAGS = ("--no-links", "--repeats", "2", "--max-tokens", "256", "--max-patches", "256")


def profiled(folder: Path, out: Path) -> PerformanceModel:
    profile(["--model", str(folder), "--out", str(out), *FLAGS, "--kv-bytes", "4MiB"])
    return PerformanceModel.from_json(out.read_text(encoding="utf-8"), str(out))


def test_the_demo_model_from_measuring_to_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, trace = tmp_path / "profile.json", tmp_path / "trace.jsonl"
    model = profiled(model_dir(), out)
    told = capsys.readouterr().out
    for stage in ("preprocess", "encode", "prefill", "decode"):
        assert f"{stage} s = " in told
        assert getattr(model, stage).num_samples >= 8
    # A merged patch is 2 x 2 patches of 192 float32; 4 layers of 2 x 2 heads of 32.
    assert model.embedding_bytes_per_patch == 192 * 4 / 4
    assert model.kv_bytes_per_token == 4 * 2 * 2 * 32 * 4
    assert model.links is None
    assert model.prefill_s([(0, 4000)]) > model.prefill_s([(0, 16)]) > 0
    assert model.encode_s(4000) > model.encode_s(16) > 0
    assert "triptych-demo in float32 on cpu" in model.measured_on
    line = '{"arrival_s": %d, "num_prompt_tokens": 99, "num_output_tokens": 2, "patches": [64]}\n'
    trace.write_text("".join(line % n for n in range(5)), encoding="utf-8")
    plan(["--trace", str(trace), "--profile", str(out), "--slo", "ttft=9,tpot=9", "--workers", "2"])
    assert "best plans" in capsys.readouterr().out


def test_a_tower_of_tiles_is_measured_too(
    tmp_path: Path, vision_dir_of: Callable[[str], Path]
) -> None:
    model = profiled(vision_dir_of("llava_next"), tmp_path / "p.json")
    assert model.encode.num_samples >= 2
    assert model.embedding_bytes_per_patch > 0


def test_a_model_of_text_has_free_pictures(
    tmp_path: Path, model_dir_of: Callable[[str], Path]
) -> None:
    model = profiled(model_dir_of("qwen3"), tmp_path / "p.json")
    assert (model.encode_s(100), model.preprocess_s(100)) == (0.0, 0.0)
    assert model.decode.num_samples >= 8


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        profile(["--out", str(tmp_path / "none" / "p.json")])
    assert caught.value.code == 2
    assert "p.json: cannot be written: No such file or directory" in capsys.readouterr().err


def test_an_audio_tower_is_measured_with_sounds(
    tmp_path: Path, audio_dir_of: Callable[[str], Path]
) -> None:
    model = profiled(audio_dir_of("qwen2_audio"), tmp_path / "p.json")
    assert model.preprocess.num_samples >= 8
    assert model.encode.num_samples >= 8
    # Two positions are a token of 32 float32.
    assert model.embedding_bytes_per_patch == pytest.approx(32 * 4 / 2, rel=0.1)
