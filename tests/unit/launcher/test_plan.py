"""Which processes are started, with what."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest

from services.launcher.plan import StopRank, in_role, service_specs, threads_per_worker
from services.launcher.settings import LauncherSettings
from shared.errors import SettingsError
from shared.runtime.settings import ModelSettings, load_settings
from shared.runtime.topology import parse_topology


@pytest.mark.parametrize(
    ("num_cores", "num_workers", "threads"),
    [(1, 3, 1), (2, 3, 2), (16, 3, 5), (8, 8, 2), (4, 0, 4)],
)
def test_cores_are_divided(num_cores: int, num_workers: int, threads: int) -> None:
    assert threads_per_worker(num_cores, num_workers) == threads


def test_workers_that_share_cores_let_idle_threads_sleep() -> None:
    settings = LauncherSettings()
    for num_cores, sleeps in ((2, True), (6, False)):
        spec = next(iter(service_specs(settings, "nats://h:1", port=9, cores=range(num_cores))))
        assert spec.environment["OMP_NUM_THREADS"] == "2"
        assert ("GOMP_SPINCOUNT" in spec.environment) == sleeps


def test_workers_that_share_cores_know_of_each_other() -> None:
    settings = LauncherSettings()
    for num_cores, group in ((2, "here"), (6, None)):
        *workers, gateway = service_specs(settings, "nats://h:1", 9, range(num_cores), "here")
        assert {spec.environment.get("TRIPTYCH_CORE_LOCK") for spec in workers} == {group}
        assert "TRIPTYCH_CORE_LOCK" not in gateway.environment


def test_workers_stay_on_cores_of_their_own_where_there_are_enough() -> None:
    settings = LauncherSettings()
    *workers, gateway = service_specs(settings, "nats://h:1", port=9, cores=range(7))
    assert [spec.cores for spec in workers] == [(0, 1), (2, 3), (4, 5)]
    assert gateway.cores == ()
    specs = service_specs(settings, "nats://h:1", port=9, cores=range(5))
    assert {spec.cores for spec in specs} == {()}


def test_pinning_can_be_left_out() -> None:
    settings = load_settings(LauncherSettings, ["--pin", "none"], "up")
    specs = service_specs(settings, "nats://h:1", port=9, cores=range(64))
    assert {spec.cores for spec in specs} == {()}


def test_quantization_is_handed_on_to_workers() -> None:
    settings = load_settings(LauncherSettings, ["--quantization", "int8"], "up")
    *workers, gateway = service_specs(settings, "nats://h:1", port=9, cores=range(2))
    assert all(dict(pairwise(spec.command))["--quantization"] == "int8" for spec in workers)
    assert "--quantization" not in gateway.command


def test_one_process_per_worker_and_a_gateway() -> None:
    settings = LauncherSettings(encoders=0, prefills=1, decodes=2)
    specs = list(service_specs(settings, "nats://127.0.0.1:1", port=9, cores=range(6)))
    assert [spec.name for spec in specs] == ["prefill-0", "decode-0", "decode-1", "gateway-0"]
    assert [spec.stop_rank for spec in specs] == [StopRank.WORKER] * 3 + [StopRank.GATEWAY]
    assert specs[0].environment["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in specs[3].environment


def test_commands() -> None:
    settings = LauncherSettings(model=ModelSettings(path="/models/vl", dtype="float32"))
    specs = list(service_specs(settings, "nats://h:1", port=9, cores=range(1)))
    encoder, gateway = specs[0].command, specs[-1].command
    assert encoder == (
        *(sys.executable, "-m", "services.encoder", "--name", "encoder-0"),
        *("--nats-url", "nats://h:1", "--model", "/models/vl", "--served-name", "vl"),
        *("--log-format", "json", "--log-level", "info", "--drain-s", "20.0"),
        *("--nats-connect-timeout-s", "10.0", "--nats-ack-wait-s", "10.0"),
        *("--metrics-port", "0", "--dtype", "float32"),
    )
    assert gateway[-4:] == ("--host", "127.0.0.1", "--port", "9")


def test_what_concerns_every_process_is_handed_on() -> None:
    argv = ["--otlp-endpoint", "http://h:4318", "--nats-credentials", "/c", "--drain-s", "60"]
    settings = load_settings(LauncherSettings, [*argv, "--log-level", "debug"], "up")
    for spec in service_specs(settings, "nats://h:1", port=9, cores=range(1)):
        given = dict(pairwise(spec.command))
        assert given["--otlp-endpoint"] == "http://h:4318"
        assert given["--nats-credentials"] == "/c"
        assert given["--drain-s"] == "60.0"
        assert given["--log-level"] == "debug"


def test_key_files_are_for_the_gateway_alone() -> None:
    argv = ["--api-key-file", "/a", "--operator-key-file", "/o"]
    settings = load_settings(LauncherSettings, argv, "up")
    *workers, gateway = service_specs(settings, "nats://h:1", port=9, cores=range(1))
    given = dict(pairwise(gateway.command))
    assert (given["--api-key-file"], given["--operator-key-file"]) == ("/a", "/o")
    assert not any("/a" in worker.command for worker in workers)


def test_each_worker_has_a_metrics_port_of_its_own() -> None:
    settings = LauncherSettings(metrics_port=9100, decodes=2)
    commands = [s.command for s in service_specs(settings, "nats://h:1", port=9, cores=range(1))]
    ports = [dict(pairwise(command)).get("--metrics-port") for command in commands]
    assert ports == ["9100", "9101", "9102", "9103", None]


def test_a_named_nats_server_is_used_wherever_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_settings(LauncherSettings, [], "up").starts_nats
    assert not load_settings(LauncherSettings, ["--nats-url", "nats://h:1"], "up").starts_nats
    file = tmp_path / "up.toml"
    file.write_text("bus.url = 'nats://h:2'")
    assert not load_settings(LauncherSettings, ["--config", str(file)], "up").starts_nats
    monkeypatch.setenv("TRIPTYCH_BUS__URL", "nats://h:3")
    settings = load_settings(LauncherSettings, [], "up")
    assert (settings.starts_nats, settings.bus.url) == (False, "nats://h:3")


def test_a_topology_says_which_stages_share_a_process() -> None:
    settings = LauncherSettings(topology="1EP 2D 1PD")
    specs = list(service_specs(settings, "nats://h:1", port=9, cores=range(8)))[:-1]
    assert [(spec.name, spec.stages) for spec in specs] == [
        ("worker-0", "encode prefill"),
        ("decode-0", "decode"),
        ("decode-1", "decode"),
        ("worker-1", "prefill decode"),
    ]
    shared, alone = dict(pairwise(specs[0].command)), dict(pairwise(specs[1].command))
    assert (shared["-m"], shared["--stages"]) == ("services.worker", "encode,prefill")
    assert alone["-m"] == "services.decode"
    assert "--stages" not in alone
    assert specs[0].environment["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--topology", "1EP"], "--topology = '1EP': no worker for decode"),
        (["--topology", "2Q 1PD"], "'2Q' should be a count and stages"),
        (
            ["--topology", "1EPD", "--decodes", "1"],
            "--topology = '1EPD' and --decodes = 1: give one or the other",
        ),
    ],
)
def test_a_wrong_topology_is_told(argv: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(LauncherSettings, argv, "up")
    assert message in str(caught.value)


def test_counts_are_the_short_form_of_a_topology() -> None:
    short = load_settings(LauncherSettings, ["--encoders", "2", "--decodes", "3"], "up")
    assert short.workers == parse_topology("2E 1P 3D")


def test_a_worker_in_another_role_keeps_its_name_and_flags() -> None:
    settings = load_settings(LauncherSettings, ["--topology", "1EP 1D"], "up")
    worker, decoder, gateway = service_specs(settings, "nats://h:1", port=9, cores=range(2))
    as_both = in_role(decoder, ("prefill", "decode"))
    assert as_both.command[2] == "services.worker"
    assert as_both.command[-2:] == ("--stages", "prefill,decode")
    assert (as_both.name, as_both.command[3:-2]) == (decoder.name, decoder.command[3:])
    as_encoder = in_role(worker, ("encode",))
    assert as_encoder.command[2] == "services.encoder"
    assert "--stages" not in as_encoder.command
    assert in_role(as_both, ("decode",)) == decoder
    assert in_role(gateway, ("decode",)) == gateway
