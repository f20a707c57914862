"""Delayed workers as processes behind a real gateway: whole answers, in no less than their time."""

from __future__ import annotations

import pytest

from bench.delayed.cluster import delayed_cluster
from bench.delayed.load import Kind, failures, send_all
from bench.delayed.profiles import PHOTO_ENCODE_S, PICTURE_PATCHES, photo_model

pytestmark = pytest.mark.timeout(300)


def test_requests_of_all_kinds_come_back_whole() -> None:
    timing = photo_model()
    pictures, wide = Kind("pictures", 2, 8, 4), Kind("wide", 1, 8, 4, picture_width=2)
    text = Kind("text", 0, 8, 12)
    with delayed_cluster("2E 1PD", timing) as cluster:
        times = [(0.0, text), (0.1, pictures), (3.0, wide)]
        outcomes = send_all(cluster.url, times, seed=1)
    assert failures(outcomes) == []
    answered = {each.kind.name: each for each in outcomes}
    assert answered["pictures"].ttft_s >= PHOTO_ENCODE_S  # side by side at best
    assert answered["wide"].ttft_s >= timing.encode_s(2 * PICTURE_PATCHES)  # by one encoder
    assert answered["text"].ttft_s < answered["wide"].ttft_s
    assert {name: each.num_tokens for name, each in answered.items()} == {
        "text": 12,
        "pictures": 4,
        "wide": 4,
    }
