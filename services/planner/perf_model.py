"""How long each stage's step takes, and how large what it hands on is.

In: what a step computes. Out: seconds and bytes. Read from and written to JSON. Pure: it knows
neither the hardware nor the schedulers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from services.planner.cluster import Links
from services.planner.fit import Fit, fit
from shared.errors import SettingsError

STEPS = ("encode", "preprocess", "prefill", "decode")
"""Names of the fitted steps."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Measured steps: what was computed, and the seconds that it took.

    `encode` and `preprocess` have (patches, seconds), `prefill` (prompt lengths, seconds), `decode`
    (context lengths, seconds). Of a model that reads text only, the first two are empty.
    """

    encode: Sequence[tuple[int, float]]
    prefill: Sequence[tuple[Sequence[int], float]]
    decode: Sequence[tuple[Sequence[int], float]]
    preprocess: Sequence[tuple[int, float]] = ()


class PerformanceModel(BaseModel):
    """encode a + b*patches; prefill a + b*sum(l) + c*sum(l^2); decode a + b*sum(context) +
    c*batch.

    `preprocess` (a + b*patches) is a picture's way from its file to patches, beside the device.
    `kv_bytes_per_token` and `embedding_bytes_per_patch` say how much travels between stages,
    `num_layers` in how many parts the former may do so, `links` how fast where that was measured;
    `measured_on` is for the reader.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    encode: Fit
    prefill: Fit
    decode: Fit
    preprocess: Fit = Fit(coefficients=(0.0, 0.0))
    kv_bytes_per_token: int = Field(ge=1)
    embedding_bytes_per_patch: float = Field(ge=0)
    num_layers: int = Field(1, ge=1)
    links: Links | None = None
    measured_on: str = ""

    @field_validator(*STEPS)
    @classmethod
    def _has_its_coefficients(cls, value: Fit, info: object) -> Fit:
        name = getattr(info, "field_name", "")
        expected = 2 if name in ("encode", "preprocess") else 3
        if len(value.coefficients) != expected or min(value.coefficients) < 0:
            raise ValueError(f"{name} needs {expected} coefficients of at least 0")
        return value

    @classmethod
    def of_samples(
        cls, samples: Samples, *, kv_bytes_per_token: int, embedding_bytes_per_patch: float
    ) -> PerformanceModel:
        """Fit all stages. Raises `SettingsError` where there are too few samples."""
        prefill_rows = [(sum(each), sum(n * n for n in each)) for each, _ in samples.prefill]
        decode_rows = [(sum(each), len(each)) for each, _ in samples.decode]
        return cls(
            encode=_fit_pictures("encode", samples.encode),
            preprocess=_fit_pictures("preprocess", samples.preprocess),
            prefill=fit("prefill", prefill_rows, [s for _, s in samples.prefill]),
            decode=fit("decode", decode_rows, [s for _, s in samples.decode]),
            kv_bytes_per_token=kv_bytes_per_token,
            embedding_bytes_per_patch=embedding_bytes_per_patch,
        )

    @classmethod
    def from_json(cls, text: str, source: str) -> PerformanceModel:
        """Read what `model_dump_json` wrote. Raises `SettingsError` that names the field."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "file"
            raise SettingsError(f"{source}: {field}: {first['msg']}") from None
        except SettingsError as error:  # what `Links` refuses
            raise SettingsError(f"{source}: {error}") from None

    def times(self, factors: Mapping[str, float]) -> PerformanceModel:
        """The same where steps of these names take so many times as long."""
        slower = {name: getattr(self, name).times(factor) for name, factor in factors.items()}
        return self.model_copy(update=slower)

    def preprocess_s(self, num_patches: int) -> float:
        """One picture, from its file to patches."""
        return self.preprocess.seconds(num_patches)

    def encode_s(self, num_patches: int) -> float:
        """One pass of the tower."""
        return self.encode.seconds(num_patches)

    def prefill_s(self, slices: Iterable[tuple[int, int]]) -> float:
        """One pass over tokens `start .. stop` of some prompts.

        Attention of a slice sees all tokens before it, so its share of l^2 is stop^2 - start^2.
        """
        spans = list(slices)
        num_tokens = sum(stop - start for start, stop in spans)
        return self.prefill.seconds(num_tokens, sum(b * b - a * a for a, b in spans))

    def decode_s(self, context_tokens: int, batch: int) -> float:
        """One step of `batch` sequences with `context_tokens` tokens in all."""
        return self.decode.seconds(context_tokens, batch)


def _fit_pictures(name: str, samples: Sequence[tuple[int, float]]) -> Fit:
    """Free of charge where nothing was measured: the model takes no pictures."""
    if not samples:
        return Fit(coefficients=(0.0, 0.0))
    return fit(name, [(patches,) for patches, _ in samples], [s for _, s in samples])
