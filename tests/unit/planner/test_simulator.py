"""The simulator against cases that can be computed by hand, queueing theory and its own books."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.planner.cluster import Cluster, Limits, Links
from services.planner.fit import Fit
from services.planner.perf_model import PerformanceModel
from services.planner.simulator import simulate
from services.planner.slo import Slo, parse_slo
from services.planner.workload import Arrival, Shape, parse_trace, poisson
from shared.errors import SettingsError

MODEL = PerformanceModel(
    encode=Fit(coefficients=(0.1, 0.001)),
    prefill=Fit(coefficients=(0.2, 0.001, 0.0)),
    decode=Fit(coefficients=(0.01, 0.0, 0.005)),
    kv_bytes_per_token=1000,
    embedding_bytes_per_patch=100,
)
LINKS = Links(queue_hop_s=0.01, token_hop_s=0.001, pull_s=0.002, bytes_per_s=1e6)
FREE = Links(queue_hop_s=0.0, token_hop_s=0.0, pull_s=0.0, bytes_per_s=1e12)
MIX = (
    Shape("text", 200, 20),
    Shape("image", 700, 8, (256, 128)),
    Shape("short", 30, 1),
)
TOPOLOGIES = ["1E 1P 1D", "2E 1P 2D", "1EPD", "2EPD", "1E 2PD", "1EP 1D", "1ED 1P", "1PD 1D 1E"]


def arrival(at_s: float, prompt: int, output: int, patches: tuple[int, ...] = ()) -> Arrival:
    fields = {"arrival_s": at_s, "num_prompt_tokens": prompt, "num_output_tokens": output}
    return Arrival.model_validate({**fields, "patches": patches})


class TestByHand:
    def test_a_picture_goes_through_three_workers(self) -> None:
        done = simulate(Cluster("1E 1P 1D", links=LINKS), MODEL, [arrival(0, 100, 3, (300,))])
        (request,) = done.requests
        # hop, tower, announcement; then the embedding's 30 kB and the prompt.
        first_s = (0.01 + 0.4 + 0.01) + (0.002 + 0.03) + 0.3 + 0.001
        # hop, 100 kB of KV, two steps of one sequence.
        assert request.ttft_s == pytest.approx(first_s)
        assert request.ended_s == pytest.approx(first_s + 0.01 + 0.102 + 2 * 0.015)
        assert request.tpot_s == pytest.approx((0.01 + 0.102 + 0.03) / 2)
        assert done.peak_blocks == (7, 7)

    def test_the_processes_around_the_devices_take_their_time(self) -> None:
        links = replace(LINKS, gateway_s=0.02, store_s=0.003, step_s=0.004)
        model = MODEL.model_copy(update={"preprocess": Fit(coefficients=(0.05, 0.0001))})
        done = simulate(Cluster("1E 1P 1D", links=links), model, [arrival(0, 100, 3, (300,))])
        (request,) = done.requests
        (plain,) = simulate(
            Cluster("1E 1P 1D", links=LINKS), MODEL, [arrival(0, 100, 3, (300,))]
        ).requests
        # The file goes into the store and out of it; a step of encode and one of prefill follow.
        assert plain.ttft_s is not None
        first_s = plain.ttft_s + 0.02 + 2 * 0.003 + (0.05 + 0.03) + 2 * 0.004
        assert request.ttft_s == pytest.approx(first_s)
        assert request.tpot_s == pytest.approx((plain.tpot_s or 0.0) + 0.004)

    def test_workers_on_one_core_take_turns(self) -> None:
        arrivals = [arrival(0, 100, 1), arrival(0, 100, 1)]
        limits = Limits(max_batch_tokens=100)
        apart, together, two = (
            simulate(Cluster("2P 1D", limits, FREE, num_cores), MODEL, arrivals)
            for num_cores in (0, 1, 2)
        )
        assert [each.ttft_s for each in apart.requests] == pytest.approx([0.3, 0.3], abs=1e-5)
        assert [each.ttft_s for each in together.requests] == pytest.approx([0.3, 0.6], abs=1e-5)
        assert [each.ttft_s for each in two.requests] == pytest.approx([0.3, 0.3], abs=1e-5)

    def test_workers_that_share_cores_have_short_passes(self) -> None:
        # Two prompts come while a first one is computed, for 0.3 s. They are one pass of 0.8 s, or
        # two of 0.5 s where prefill and decode have one core.
        arrivals = [arrival(0, 100, 1), arrival(0.1, 300, 1), arrival(0.1, 300, 1)]
        for num_cores, seen_s in ((0, [0.3, 1.1, 1.1]), (2, [0.3, 1.1, 1.1]), (1, [0.3, 0.8, 1.3])):
            done = simulate(Cluster("1P 1D", Limits(), FREE, num_cores), MODEL, arrivals).requests
            assert [each.first_s for each in done] == pytest.approx(seen_s, abs=1e-5)

    def test_the_gateways_work_slows_down_those_on_its_core(self) -> None:
        links = replace(FREE, token_s=0.01)
        (alone,) = simulate(Cluster("1PD", links=links), MODEL, [arrival(0, 100, 3)]).requests
        (shared,) = simulate(
            Cluster("1PD", links=links, num_cores=1), MODEL, [arrival(0, 100, 3)]
        ).requests
        assert alone.tpot_s == pytest.approx(0.015, abs=1e-5)
        # The first two tokens' 0.01 s run beside the next step's 0.015 s, the last one's alone:
        # tokens are seen 0.02, 0.045 and 0.06 s after the prefill.
        assert shared.tpot_s == pytest.approx(0.02, abs=1e-5)

    def test_the_gateway_passes_one_step_on_after_the_other(self) -> None:
        links = replace(FREE, event_s=0.02, token_s=0.01)
        (request,) = simulate(Cluster("1PD", links=links), MODEL, [arrival(0, 100, 3)]).requests
        assert request.ttft_s == pytest.approx(0.3 + 0.03, abs=1e-5)
        # Steps take 0.015 s, their news 0.03 s each.
        assert request.tpot_s == pytest.approx(0.03, abs=1e-5)

    def test_work_that_nobody_waits_for_takes_its_share(self) -> None:
        links = replace(FREE, request_s=0.1, picture_s=0.4)
        arrivals = [arrival(0, 100, 1, (300,))]
        alone, shared = (
            simulate(Cluster("1EPD", links=links, num_cores=num_cores), MODEL, arrivals)
            for num_cores in (0, 1)
        )
        assert alone.requests[0].ttft_s == pytest.approx(0.4 + 0.3, abs=1e-5)
        # 0.1 s beside the tower, all of the prompt's 0.3 s beside the picture's 0.4 s.
        assert shared.requests[0].ttft_s == pytest.approx(0.4 + 0.1 + 2 * 0.3, abs=1e-5)

    def test_cores_that_hinder_each_other_are_slower_when_all_are_busy(self) -> None:
        arrivals = [arrival(0, 100, 1), arrival(0, 100, 1)]
        limits = Limits(max_batch_tokens=100)
        cluster = Cluster("2P 1D", limits, FREE, num_cores=2, full_speed=0.75)
        both = simulate(cluster, MODEL, arrivals).requests
        (alone,) = simulate(cluster, MODEL, arrivals[:1]).requests
        assert [each.ttft_s for each in both] == pytest.approx([0.4, 0.4], abs=1e-5)
        assert alone.ttft_s == pytest.approx(0.3, abs=1e-5)

    def test_kv_travels_while_the_prompt_is_computed(self) -> None:
        # 200 kB of each of 4 layers: two groups of two layers.
        model = MODEL.model_copy(update={"num_layers": 4, "kv_bytes_per_token": 2000})
        links = replace(LINKS, queue_hop_s=0.05)
        layer_wise, whole = (
            simulate(Cluster("1P 1D", Limits(kv_transfer=mode), links), model, [arrival(0, 400, 2)])
            for mode in ("layer-wise", "whole")
        )
        # The first step follows the hop and all 800 kB, or half of them alone.
        assert whole.requests[0].tpot_s == pytest.approx(0.05 + 0.802 + 0.015)
        assert layer_wise.requests[0].tpot_s == pytest.approx(0.402 + 0.015)
        assert layer_wise.requests[0].ttft_s == whole.requests[0].ttft_s
        assert [pool.num_used for pool in layer_wise.pools] == [0, 0]

    def test_where_the_time_went_adds_up(self) -> None:
        links = replace(LINKS, gateway_s=0.02, store_s=0.003, dispatch_s=0.004)
        done = simulate(Cluster("1E 1P 1D", links=links), MODEL, [arrival(0, 100, 3, (300,))])
        (request,) = done.requests
        assert request.spans_s == pytest.approx(
            {
                "ingest": 0.02,
                "media.store": 0.003,
                "dispatch": 0.008,
                "queue.encode": 0.01,
                "media.fetch": 0.003,
                "preprocess": 0.0,
                "encode": 0.4,
                "queue.prefill": 0.01,
                "wait.embedding": 0.003 + 0.4 + 0.01,
                "transfer.embedding": 0.032,
                "prefill": 0.3,
                "queue.decode": 0.01,
                "transfer.kv": 0.102,
                "decode": 0.03,
            }
        )

    def test_one_process_transfers_nothing(self) -> None:
        done = simulate(
            Cluster("1EPD", Limits(mixed_step_tokens=0), LINKS), MODEL, [arrival(0, 100, 3, (300,))]
        )
        (request,) = done.requests
        assert request.ttft_s == pytest.approx(0.01 + 0.4 + 0.01 + 0.3 + 0.001)
        assert request.tpot_s == pytest.approx(0.015)
        assert done.peak_blocks == (7,)

    def test_two_encoders_share_the_pictures_of_a_request(self) -> None:
        one, two = (
            simulate(Cluster(f"{n}E 1P 1D", Limits(max_batch_patches=300), FREE), MODEL, [it])
            for n, it in ((1, arrival(0, 100, 1, (300, 300))), (2, arrival(0, 100, 1, (300, 300))))
        )
        assert one.requests[0].ttft_s == pytest.approx(0.4 + 0.4 + 0.3, abs=1e-6)
        assert two.requests[0].ttft_s == pytest.approx(0.4 + 0.3, abs=1e-6)

    def test_a_full_decoder_makes_the_next_answer_wait(self) -> None:
        limits = Limits(max_batch=1, max_batch_tokens=200)
        arrivals = [arrival(0, 100, 11), arrival(0, 100, 11)]
        done = simulate(Cluster("1P 1D", limits, FREE), MODEL, arrivals)
        # The first prompt is computed alone, the second during the first one's answer.
        first, second = done.requests
        assert first.ended_s == pytest.approx(0.3 + 10 * 0.015, abs=1e-5)
        assert second.ttft_s == pytest.approx(0.6, abs=1e-5)
        arrivals = [arrival(0, 100, 101), arrival(0, 100, 11)]
        first, second = simulate(Cluster("1P 1D", limits, FREE), MODEL, arrivals).requests
        assert first.ended_s == pytest.approx(0.3 + 1.5, abs=1e-5)
        assert second.ended_s == pytest.approx(0.3 + 1.5 + 0.15, abs=1e-5)

    def test_what_can_never_fit_is_refused(self) -> None:
        limits = Limits(num_blocks=8)
        arrivals = [arrival(0, 200, 2), arrival(0, 100, 60), arrival(0, 100, 2)]
        done = simulate(Cluster("1P 1D", limits, FREE), MODEL, arrivals)
        assert [each.is_refused for each in done.requests] == [True, True, False]
        assert all(pool.num_used == 0 for pool in done.pools)


def test_prompts_wait_as_in_an_m_d_1_queue() -> None:
    service_s, load = 0.3, 0.7
    arrivals = poisson(
        [Shape("text", 100, 1)], rate_per_s=load / service_s, num_requests=20_000, seed=5
    )
    limits = Limits(max_batch_tokens=100, max_held=1_000)
    done = simulate(Cluster("1P 1D", limits, FREE), MODEL, arrivals)
    waits = [(each.ttft_s or 0.0) - service_s for each in done.requests]
    expected_s = load * service_s / (2 * (1 - load))
    assert sum(waits) / len(waits) == pytest.approx(expected_s, rel=0.08)
    assert done.busy_s[0] == pytest.approx(20_000 * service_s)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("num_blocks", [64, 4096])
def test_every_request_ends_once_and_the_pools_are_empty(topology: str, num_blocks: int) -> None:
    arrivals = poisson(MIX, rate_per_s=8.0, num_requests=150, seed=1)
    limits = Limits(num_blocks=num_blocks, max_batch=4, max_held=3)
    done = simulate(Cluster(topology, limits, LINKS), MODEL, arrivals)
    assert max(done.peak_blocks) > 0
    assert [each.num_ends for each in done.requests] == [1] * 150
    assert not any(each.is_refused for each in done.requests)
    for pool in done.pools:
        pool.check_invariants()
        assert pool.num_used == 0
        assert pool.peak_used <= num_blocks


def test_the_same_seed_gives_the_same_result() -> None:
    def times(seed: int) -> list[tuple[float | None, float | None]]:
        arrivals = poisson(MIX, rate_per_s=4.0, num_requests=80, seed=seed)
        done = simulate(Cluster("1E 2PD", links=LINKS), MODEL, arrivals)
        return [(each.ttft_s, each.ended_s) for each in done.requests]

    assert times(7) == times(7)
    assert times(7) != times(8)


def test_pictures_need_an_encoder() -> None:
    with pytest.raises(SettingsError, match=r"topology = '1P 1D': no worker encodes"):
        simulate(Cluster("1P 1D"), MODEL, [arrival(0, 10, 1, (4,))])


class TestInputs:
    def test_a_trace_is_read_in_order_of_arrival(self) -> None:
        lines = [
            '{"arrival_s": 2, "num_prompt_tokens": 5, "num_output_tokens": 1, "class": "text"}',
            "",
            '{"arrival_s": 1, "num_prompt_tokens": 9, "num_output_tokens": 2, "patches": [4, 8]}',
        ]
        first, second = parse_trace(lines, "t")
        assert (first.patches, first.kind, second.kind) == ((4, 8), "all", "text")

    @pytest.mark.parametrize(
        ("line", "told"),
        [
            ("{}", "t:1: arrival_s: Field required"),
            ('{"arrival_s": -1, "num_prompt_tokens": 1, "num_output_tokens": 1}', "t:1: arrival_s"),
            ("nonsense", "t:1: line: Invalid JSON"),
        ],
    )
    def test_a_bad_line_is_named(self, line: str, told: str) -> None:
        with pytest.raises(SettingsError, match=told):
            parse_trace([line], "t")

    def test_an_empty_trace_is_refused(self) -> None:
        with pytest.raises(SettingsError, match="holds no request"):
            parse_trace([], "t")

    def test_an_slo_is_parsed(self) -> None:
        assert parse_slo("ttft=2, tpot=0.05") == Slo(2.0, 0.05)

    @pytest.mark.parametrize("text", ["", "ttft=2", "ttft=2,tpot=x", "ttft=0,tpot=1", "ttft=nan"])
    def test_a_bad_slo_is_told(self, text: str) -> None:
        with pytest.raises(SettingsError, match="--slo = "):
            parse_slo(text)
