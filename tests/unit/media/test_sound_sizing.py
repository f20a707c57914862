"""How many tokens a sound becomes, and which lengths are refused."""

from __future__ import annotations

import pytest

from shared.errors import FailureKind, RequestFailed
from shared.media.sizing.sound import SoundLayout, SoundSizing

SIZING = SoundSizing()


def by_the_processor(num_samples: int) -> int:
    """transformers 5.23: frames of the mask, then its processor's formula."""
    num_frames = len(range(0, num_samples, 160))
    return ((num_frames - 1) // 2 + 1 - 2) // 2 + 1


@pytest.mark.parametrize("start", [321, 1_440, 159_998, 477_000])
def test_every_length_agrees_with_the_processor(start: int) -> None:
    for num_samples in range(start, min(start + 3_000, SIZING.max_samples + 1)):
        layout = SIZING.measure(num_samples)
        assert layout.num_tokens == by_the_processor(num_samples)
        assert layout.grid_thw == (layout.num_positions, 1, 1)


def test_well_known_lengths() -> None:
    assert SIZING.measure(16_000) == SoundLayout(100, 50, 25)
    assert SIZING.measure(480_000) == SoundLayout(3000, 1500, 750)
    assert SIZING.measure(321) == SoundLayout(3, 2, 1)
    assert SIZING.max_duration_s == 30.0


def test_a_model_may_have_other_steps() -> None:
    sizing = SoundSizing(rate_hz=8_000, hop_samples=100, max_samples=80_000)
    assert sizing.min_samples == 201
    assert sizing.measure(201).num_tokens == 1
    assert sizing.policy != SIZING.policy


@pytest.mark.parametrize(
    ("num_samples", "words"),
    [
        (480_001, "480001 samples at 16000 Hz, which is 30 s; the limit is 30 s"),
        (960_000, "which is 60 s; the limit is 30 s"),
        (320, "320 samples at 16000 Hz, which is 0.02 s; 321 samples are the least"),
        (0, "0 samples at 16000 Hz"),
    ],
)
def test_lengths_that_are_refused(num_samples: int, words: str) -> None:
    with pytest.raises(RequestFailed, match=words) as raised:
        SIZING.measure(num_samples)
    assert raised.value.kind is FailureKind.BAD_REQUEST
