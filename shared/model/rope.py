"""Rotary position embedding: frequencies of every supported kind, one or three position axes.

In: positions of a step. Out: a `Rotary` used by every layer of that step. Angles are computed in
float32 whatever the model's dtype and only then cast, as transformers does: a float64 model has
the same float32 angles there and here, so the two agree to float64 rounding.

Sources: Su et al. 2021 (RoFormer, section 3.4); Peng et al. 2023 (YaRN, section 3.2, "NTK by
parts"); Wang et al. 2024 (Qwen2-VL, section 2.1, M-RoPE).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from shared.model.gpu import fused
from shared.model.kernels import row_kernels
from shared.model.rope_spec import RopeSpec


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """Cosine and signed sine of one step, both `[num_tokens, 1, head_dim]` in the model's dtype.

    The sine's first half is negated once here, so that rotating needs a swap of halves only.
    """

    cos: torch.Tensor
    sin_signed: torch.Tensor

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate `x` `[num_tokens, heads, head_dim]`."""
        if fused.takes(x):
            return fused.rotate(x, self.cos, self.sin_signed)
        compiled = row_kernels.rotate(x, self.cos, self.sin_signed)
        if compiled is not None:
            return compiled
        half = x.shape[-1] // 2
        swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
        return x * self.cos + swapped * self.sin_signed


class RotaryEmbedding:
    """Frequencies of one model; stateless between steps."""

    def __init__(self, spec: RopeSpec, head_dim: int, device: torch.device | str = "cpu") -> None:
        self._inv_freq = inverse_frequencies(spec, head_dim).to(device)
        self._axis_of_channel = _axis_of_channel(spec, head_dim).to(device)
        self._scaling = spec.attention_scaling

    def at(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotary:
        """Rotary of `positions` `[num_tokens]` or `[3, num_tokens]`, cast to `dtype`."""
        if positions.ndim == 2:
            per_channel = positions.float()[self._axis_of_channel].T  # [num_tokens, head_dim / 2]
        else:
            per_channel = positions.float()[:, None]
        angles = per_channel * self._inv_freq
        cos, sin = angles.cos() * self._scaling, angles.sin() * self._scaling
        return Rotary(
            cos=torch.cat((cos, cos), dim=-1).to(dtype)[:, None],
            sin_signed=torch.cat((-sin, sin), dim=-1).to(dtype)[:, None],
        )


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> torch.Tensor:
    """Radians per position for each channel pair, `[head_dim / 2]` float32.

    "dynamic" stretches the base only beyond the config's context limit, which no request exceeds:
    up to there it is the default kind.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    periods = spec.theta**exponents
    inv_freq = 1.0 / periods
    if spec.rope_type == "linear":
        return inv_freq / spec.factor
    if spec.rope_type == "llama3":
        return _llama3(inv_freq, spec)
    if spec.rope_type == "yarn":
        return _yarn(periods, head_dim, spec)
    return inv_freq


def _llama3(inv_freq: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """Keep short wavelengths, divide long ones by the factor, blend linearly in between."""
    longest_kept = spec.original_max_tokens / spec.high_freq_factor
    shortest_scaled = spec.original_max_tokens / spec.low_freq_factor
    wavelength = 2 * math.pi / inv_freq
    blend = (spec.original_max_tokens / wavelength - spec.low_freq_factor) / (
        spec.high_freq_factor - spec.low_freq_factor
    )
    blended = (1 - blend) * (inv_freq / spec.factor) + blend * inv_freq
    scaled = torch.where(wavelength > shortest_scaled, inv_freq / spec.factor, blended)
    return torch.where(wavelength < longest_kept, inv_freq, scaled)


def _yarn(periods: torch.Tensor, head_dim: int, spec: RopeSpec) -> torch.Tensor:
    """Keep pairs that turn often within the original context, divide rare ones by the factor.

    Between the two, a ramp over the pairs' indices.
    """
    first, last = _yarn_range(head_dim, spec)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    # Where first and last coincide, the ramp is a step.
    width = last - first if last != first else 0.001
    kept = 1 - ((pairs - first) / width).clamp(0, 1)
    return 1.0 / (spec.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _yarn_range(head_dim: int, spec: RopeSpec) -> tuple[float, float]:
    """Indices of the last pair that is kept and of the first that is divided."""

    def pair_that_turns(rotations: float) -> float:
        turns = spec.original_max_tokens / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(spec.theta))

    first, last = pair_that_turns(spec.beta_fast), pair_that_turns(spec.beta_slow)
    if spec.truncate:
        first, last = math.floor(first), math.ceil(last)
    return max(first, 0), min(last, head_dim - 1)


def _axis_of_channel(spec: RopeSpec, head_dim: int) -> torch.Tensor:
    """Which position axis (0 temporal, 1 height, 2 width) each channel pair follows."""
    half = head_dim // 2
    if spec.mrope_section is None:
        return torch.zeros(half, dtype=torch.int64)
    sections = torch.tensor(spec.mrope_section)
    if int(sections.sum()) != half:
        raise ValueError(
            f"mrope_section {spec.mrope_section} sums to {int(sections.sum())}, "
            f"but head_dim {head_dim} has {half} channel pairs"
        )
    if not spec.mrope_interleaved:
        return torch.repeat_interleave(torch.arange(3), sections)
    # Height and width take every third pair as long as they have any; the rest is temporal.
    pairs = torch.arange(half)
    axes = pairs % 3
    return torch.where(pairs < 3 * sections[axes], axes, 0)
