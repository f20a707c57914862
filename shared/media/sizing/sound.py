"""Qwen2-Audio: what a sound becomes in the prompt, from its number of samples alone.

Must agree with transformers' feature extractor and processor for every length: prefill and encoder
count on it. A spectrum is taken every `hop_samples`, a convolution halves their number, the tower
pools pairs of what is left. Source: Qwen2-Audio (arXiv 2407.10759), section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import FailureKind, RequestFailed

# Spectra that one position of the tower is made from, and positions that one token is made from.
STRIDE = 2
POOL = 2


@dataclass(frozen=True, slots=True)
class SoundLayout:
    """A sound as the tower sees it: so many spectra, positions behind the convolutions, tokens."""

    num_frames: int
    num_positions: int
    num_tokens: int

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """As pictures have it: all positions lie in time."""
        return (self.num_positions, 1, 1)


@dataclass(frozen=True, slots=True)
class SoundSizing:
    """The feature extractor's settings: samples a second, between spectra, and at most."""

    rate_hz: int = 16_000
    hop_samples: int = 160
    max_samples: int = 480_000

    @property
    def max_duration_s(self) -> float:
        """The longest sound."""
        return self.max_samples / self.rate_hz

    @property
    def min_samples(self) -> int:
        """The shortest sound that gives a token."""
        return STRIDE * self.hop_samples * (POOL - 1) + 1

    @property
    def policy(self) -> str:
        """Names everything that decides what becomes of a sound."""
        return repr(self)

    def measure(self, num_samples: int) -> SoundLayout:
        """Raises `RequestFailed` (bad request) for a sound too short or too long for the model."""
        if num_samples > self.max_samples:
            raise self._refused(num_samples, f"the limit is {self.max_duration_s:g} s")
        if num_samples < self.min_samples:
            raise self._refused(num_samples, f"{self.min_samples} samples are the least")
        num_frames = -(-num_samples // self.hop_samples)
        num_positions = -(-num_frames // STRIDE)
        return SoundLayout(num_frames, num_positions, num_positions // POOL)

    def _refused(self, num_samples: int, limit: str) -> RequestFailed:
        return RequestFailed(
            FailureKind.BAD_REQUEST,
            f"audio refused: it has {num_samples} samples at {self.rate_hz} Hz, which is "
            f"{num_samples / self.rate_hz:.4g} s; {limit}",
        )
