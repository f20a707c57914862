"""How long the delays are: performance models fitted to published figures of large machines.

A bench's picture of `PICTURE_PIXELS` a side stands for a photograph of 4032 x 3024 pixels: its
patches and tokens are fewer, and each takes as much longer.

Source: Singh et al. 2025 (arXiv 2501.05460), tables 1, 4 and 6: MiniCPM-V 2.6 on A100. Prefill is
what 7.6 billion weights take at half of that device's 312 TFLOP/s.
"""

from __future__ import annotations

from services.planner.perf_model import PerformanceModel, Samples

TOKEN_STANDS_FOR = 10
"""Prompt tokens of the published model for one of a bench."""
PATCH_STANDS_FOR = 40

SCALED_SETTINGS = {
    "TRIPTYCH_MAX_BATCH_PATCHES": str(16_384 // PATCH_STANDS_FOR),
    "TRIPTYCH_MAX_BATCH_TOKENS": str(4096 // TOKEN_STANDS_FOR),
    "TRIPTYCH_MIXED_STEP_TOKENS": str(256 // TOKEN_STANDS_FOR),
}
"""The workers' default limits of a step, in a bench's patches and tokens."""

PICTURE_PIXELS = 224
PICTURE_PATCHES = 256
PICTURE_TOKENS = 64

PHOTO_ENCODE_S = 0.405
"""Table 4 without parallel encoding: 0.4675 s more for each picture, less its prefill."""
PHOTO_TOKENS = 640
PREFILL_TOKEN_S = 2 * 7.6e9 / 156e12
STEP_S = 0.005
ANSWER_S = 0.0026
"""Table 6: 0.05 s a step with 18 answers on each decoder, 0.12 s with 45, so 2.6 ms an answer."""

_PREFILL_S = 0.02


def photo_model(
    picture_patches: int = PICTURE_PATCHES, picture_tokens: int = PICTURE_TOKENS
) -> PerformanceModel:
    """The model behind the benches of many workers; see the module for where it comes from.

    A picture takes the same time however many patches and tokens it has in a bench.
    """
    token_s = PREFILL_TOKEN_S * PHOTO_TOKENS / picture_tokens
    return PerformanceModel.of_samples(
        Samples(
            encode=[(n * picture_patches, n * PHOTO_ENCODE_S) for n in (1, 2, 4, 8)],
            prefill=[([n], _PREFILL_S + n * token_s) for n in (64, 128, 512, 2048)],
            decode=[([200] * n, STEP_S + n * ANSWER_S) for n in (1, 2, 18, 45, 64)],
        ),
        kv_bytes_per_token=2048,
        embedding_bytes_per_patch=192.0,
    )


def slowed(timing: PerformanceModel, factor: float) -> PerformanceModel:
    """All times that much longer: what the real parts cost beside them counts that much less."""
    changes = {
        name: fit.model_copy(
            update={"coefficients": tuple(factor * each for each in fit.coefficients)}
        )
        for name, fit in (
            ("encode", timing.encode),
            ("prefill", timing.prefill),
            ("decode", timing.decode),
        )
    }
    return timing.model_copy(update=changes)
