"""How a worker computes plain decode steps: CUDA graphs on a GPU, recordings on a CPU.

In: the language model of the process and bounds. Out: something that is called like the model.
"""

from __future__ import annotations

from services.decode.settings import DecodeSettings
from shared.model.forward_step import ForwardStep
from shared.model.gpu.decode_graphs import decode_step
from shared.model.gpu.graph_limits import GraphLimits
from shared.model.recorded_steps import RecordedSteps
from shared.runtime.language import Language


def decode_steps(language: Language, settings: DecodeSettings) -> ForwardStep:
    """Captures the graphs at once, which takes seconds. Blocks."""
    model, kv = language.model, language.kv
    if kv.device.type != "cuda":
        return RecordedSteps(model, kv)
    if not settings.graphs.memory_bytes or language.scratch_block_id is None:
        return model
    limits = graph_limits(settings, language.pool.num_blocks * kv.block_size)
    return decode_step(model, kv, limits, language.scratch_block_id)


def graph_limits(settings: DecodeSettings, cache_tokens: int) -> GraphLimits:
    """What is captured: batches of any size that the worker takes, of contexts that fit into its
    cache and are not out of the ordinary."""
    return GraphLimits(
        max_batch=settings.max_batch,
        max_context_tokens=min(settings.graphs.context_tokens, cache_tokens),
        max_bytes=settings.graphs.memory_bytes,
    )
