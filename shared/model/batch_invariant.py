"""A language model whose results do not depend on what is computed together, to the last bit.

In: a loaded float32 model on a CPU. Out: the same model, on kernels in which a row's sums have one
order however many rows share a call. Without this, keys and values that a prompt computes at once
and those that decoding computes token by token differ by rounding, and a random draw that falls
within it of the border between two tokens goes either way: then a recovered answer may differ.

Linear maps are oneDNN's on its own layout; every token attends by the kernel of decode steps;
activations are computed a few rows at a time, since torch cuts longer ones between its threads
without regard to rows, and computes what a cut leaves over by another formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from shared.cache.kv_cache import KvCache
from shared.errors import SettingsError
from shared.model.attention import AttentionPlan
from shared.model.batch import ForwardBatch
from shared.model.cpu_attention import PagedPlan
from shared.model.decoder import LanguageModel
from shared.model.kernels.choice import KernelChoice, has_compiled_kernels
from shared.model.kernels.narrow import VECTOR_LANES
from shared.model.mlp import GatedMlp
from shared.modelspec import TextSpec

UNCUT_VALUES = 32768
"""torch computes an elementwise function of fewer values on one thread."""

WIDEST_VECTOR = 16
"""float32 values in the widest vector of a CPU: rows of a multiple of it leave nothing over."""

Activation = Callable[[torch.Tensor], torch.Tensor]


def invariant_kernels(
    spec: TextSpec, device: str, dtype: str, wished: KernelChoice
) -> KernelChoice:
    """The kernels to load the model with. `SettingsError` where no bits can be promised."""
    if device != "cpu" or dtype != "float32":
        raise _refusal(f"device cpu and dtype float32, not {device} and {dtype}")
    if wished.quantization != "none" or wished.linear not in ("auto", "packed"):
        raise _refusal(
            "linear_kernel 'auto' or 'packed' and no quantization, "
            f"not {wished.linear!r} and {wished.quantization!r}"
        )
    if spec.moe is not None or spec.bidirectional_media:
        raise _refusal("a dense model that reads pictures causally")
    if spec.head_dim % VECTOR_LANES or spec.intermediate_size % WIDEST_VECTOR:
        raise _refusal(
            f"a head size that is a multiple of {VECTOR_LANES} and an MLP width that is one of "
            f"{WIDEST_VECTOR}, not {spec.head_dim} and {spec.intermediate_size}"
        )
    if not has_compiled_kernels():
        raise _refusal("a CPU with AVX2 and the package numba")
    return KernelChoice("packed")


def make_batch_invariant(model: LanguageModel) -> None:
    """Change a model that was loaded with `invariant_kernels`."""
    model.backend = TokenwiseAttention()
    for module in model.modules():
        if isinstance(module, GatedMlp):
            module.activation = _few_rows_at_a_time(module.activation)


class TokenwiseAttention:
    """Every token of a step is a sequence of its own, whose context ends with it."""

    def plan(
        self, batch: ForwardBatch, kv: KvCache, sliding_windows: Sequence[int | None] = ()
    ) -> AttentionPlan:
        q_lens = batch.cu_seqlens_q.diff()
        sequence = torch.repeat_interleave(q_lens)  # [num_tokens]
        num_later = batch.cu_seqlens_q[1:][sequence] - torch.arange(batch.num_tokens) - 1
        tokenwise = replace(
            batch,
            block_tables=batch.block_tables[sequence],
            context_lens=batch.context_lens[sequence] - num_later,
        )
        return PagedPlan(tokenwise, kv, tuple(sliding_windows))


def _few_rows_at_a_time(activation: Activation) -> Activation:
    def run(x: torch.Tensor) -> torch.Tensor:
        num_rows = max(1, (UNCUT_VALUES - 1) // x.shape[-1])
        if x.shape[0] <= num_rows:
            return activation(x)
        return torch.cat([activation(rows) for rows in torch.split(x, num_rows)])

    return run


def _refusal(needed: str) -> SettingsError:
    return SettingsError(f"deterministic = True needs {needed}")
