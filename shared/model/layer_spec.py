"""What differs from decoder layer to decoder layer.

In: the language part of a config and its family. Out: one `LayerSpec` per layer. Knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import UnsupportedModel
from shared.model.config_fields import Config, required
from shared.model.registry import Family
from shared.model.rope_spec import RopeSpec

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer.

    `sliding_window`: how many tokens a token sees, itself included; None for all before it.
    `rope`: None where positions are not encoded. `is_moe`: experts instead of one MLP.
    """

    sliding_window: int | None
    rope: RopeSpec | None
    is_moe: bool


def layer_specs(text: Config, family: Family) -> tuple[LayerSpec, ...]:
    """One entry per layer; `UnsupportedModel` names a list that does not fit."""
    num_layers = int(required(text, "num_hidden_layers"))
    rotated = _rotated_layers(text, family, num_layers)
    is_sliding = _sliding_layers(text, family, rotated)
    window = _window(text) if any(is_sliding) else None
    ropes = {False: RopeSpec.of(text, family), True: RopeSpec.of_sliding_layers(text, family)}
    return tuple(
        LayerSpec(
            sliding_window=window if is_sliding[i] else None,
            rope=ropes[is_sliding[i]] if rotated[i] else None,
            is_moe=family.moe and _is_sparse(text, i),
        )
        for i in range(num_layers)
    )


def _rotated_layers(text: Config, family: Family, num_layers: int) -> list[bool]:
    """Layers with rotary positions; 0 in `no_rope_layers` means none."""
    if not family.nope:
        return [True] * num_layers
    given = text.get("no_rope_layers")
    if given is None:
        interval = int(required(text, "no_rope_layer_interval"))
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    if len(given) < num_layers:
        raise UnsupportedModel(
            f"no_rope_layers has {len(given)} entries; supported: one for each of {num_layers}"
        )
    return [bool(flag) for flag in given[:num_layers]]


def _sliding_layers(text: Config, family: Family, rotated: list[bool]) -> list[bool]:
    by_rule = _by_rule(text, family, rotated)
    given = text.get("layer_types")
    if not given:
        return by_rule
    num_layers = len(rotated)
    other = sorted(set(given) - {_FULL, _SLIDING})
    if other:
        raise UnsupportedModel(f"layer_types has {other}; supported: {[_FULL, _SLIDING]}")
    if len(given) < num_layers:
        raise UnsupportedModel(
            f"layer_types has {len(given)} entries; supported: one for each of {num_layers}"
        )
    listed = [kind == _SLIDING for kind in given[:num_layers]]
    if family.sliding in ("none", "all") and listed != by_rule:
        wanted = _SLIDING if any(by_rule) else _FULL
        raise UnsupportedModel(
            f"layer_types={sorted(set(given))} is not supported for {family.model_type}; "
            f"supported here: {wanted} in every layer"
        )
    if any(listed) and family.sliding in ("late", "unrotated") and not _uses_window(text):
        raise UnsupportedModel(
            f"layer_types has {_SLIDING}, which needs use_sliding_window=True and a sliding_window"
        )
    return listed


def _by_rule(text: Config, family: Family, rotated: list[bool]) -> list[bool]:
    """Sliding layers where no list names them."""
    num_layers = len(rotated)
    if family.sliding == "pattern":
        pattern = int(required(text, "sliding_window_pattern"))
        return [bool((i + 1) % pattern) for i in range(num_layers)]
    if family.sliding == "all":
        return [_uses_window(text)] * num_layers
    if not _uses_window(text):
        return [False] * num_layers
    if family.sliding == "unrotated":
        return [not flag for flag in rotated]
    first = int(text.get("max_window_layers") or 0)
    late = [i >= first for i in range(num_layers)]
    if family.sliding == "none" and any(late):
        raise UnsupportedModel(
            f"use_sliding_window=True from layer {first} of {num_layers} is not supported for "
            f"{family.model_type}; supported: full attention in every layer"
        )
    return late


def _uses_window(text: Config) -> bool:
    return bool(text.get("use_sliding_window")) and text.get("sliding_window") is not None


def _window(text: Config) -> int:
    window = int(required(text, "sliding_window"))
    if window < 1:
        raise UnsupportedModel(f"sliding_window={window} is not supported; supported: 1 or more")
    return window


def _is_sparse(text: Config, layer: int) -> bool:
    step = int(text.get("decoder_sparse_step") or 1)
    return layer not in (text.get("mlp_only_layers") or ()) and (layer + 1) % step == 0
