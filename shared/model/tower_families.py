"""Where the tower of each family comes from and what its tensors are called.

In: nothing. Out: one `TowerFamily` for each kind of tower, for the table of families. Names of
classes and prefixes only: no torch, no transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TowerKind = Literal["patches", "llava", "anyres", "gemma3", "internvl", "idefics3", "audio"]


@dataclass(frozen=True, slots=True)
class TowerFamily:
    """A tower in transformers and its names in a checkpoint.

    `module` and `class_name` are the class that the kind is built on: the whole tower of `patches`,
    the projector of all others. `names` maps the beginning of a tensor's name in a checkpoint to
    its beginning inside the tower, the more specific first. `config_field` is the config's part
    that describes the tower. The fields below it are for `patches`: the config's field with the
    width of a row, what its vision config says where it is silent, and whether videos are read.
    """

    kind: TowerKind
    module: str
    class_name: str
    names: tuple[tuple[str, str], ...]
    config_field: str = "vision_config"
    out_hidden_field: str | None = None
    default_patch_size: int = 14
    default_deepstack_layers: tuple[int, ...] = ()
    clips: bool = False

    def local_name(self, tensor_name: str) -> str | None:
        """The name inside the tower; None for a tensor of another part."""
        for prefix, local_prefix in self.names:
            if tensor_name.startswith(prefix):
                return local_prefix + tensor_name.removeprefix(prefix)
        return None


def _both_layouts(*names: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Newer checkpoints put everything under `model.`, older ones do not."""
    return tuple((start + name, local) for name, local in names for start in ("model.", ""))


_TOWER_AND_PROJECTOR = _both_layouts(
    ("vision_tower.vision_model.", "vision_tower."),
    ("vision_tower.", "vision_tower."),
    ("multi_modal_projector.", "projector."),
)
_TOWER_PROJECTOR_AND_NEWLINE = (
    *_TOWER_AND_PROJECTOR,
    *_both_layouts(("image_newline", "image_newline")),
)
_VISUAL = _both_layouts(("visual.", ""))
_VISION_MODEL_AND_CONNECTOR = (
    ("model.vision_model.", "vision_tower."),
    ("model.connector.", "projector."),
)


def _modeling(family: str) -> str:
    return f"transformers.models.{family}.modeling_{family}"


QWEN2_VL = TowerFamily(
    "patches",
    _modeling("qwen2_vl"),
    "Qwen2VisionTransformerPretrainedModel",
    _VISUAL,
    out_hidden_field="hidden_size",
    clips=True,
)
QWEN2_5_VL = TowerFamily(
    "patches",
    _modeling("qwen2_5_vl"),
    "Qwen2_5_VisionTransformerPretrainedModel",
    _VISUAL,
    out_hidden_field="out_hidden_size",
    clips=True,
)
QWEN3_VL = TowerFamily(
    "patches",
    _modeling("qwen3_vl"),
    "Qwen3VLVisionModel",
    _VISUAL,
    out_hidden_field="out_hidden_size",
    default_patch_size=16,
    default_deepstack_layers=(8, 16, 24),
)
QWEN3_VL_MOE = TowerFamily(
    "patches",
    _modeling("qwen3_vl_moe"),
    "Qwen3VLMoeVisionModel",
    _VISUAL,
    out_hidden_field="out_hidden_size",
    default_patch_size=16,
    default_deepstack_layers=(8, 16, 24),
)
LLAVA = TowerFamily("llava", _modeling("llava"), "LlavaMultiModalProjector", _TOWER_AND_PROJECTOR)
LLAVA_NEXT = TowerFamily(
    "anyres",
    _modeling("llava_next"),
    "LlavaNextMultiModalProjector",
    _TOWER_PROJECTOR_AND_NEWLINE,
)
LLAVA_ONEVISION = TowerFamily(
    "anyres",
    _modeling("llava_onevision"),
    "LlavaOnevisionMultiModalProjector",
    _TOWER_PROJECTOR_AND_NEWLINE,
)
GEMMA3 = TowerFamily(
    "gemma3", _modeling("gemma3"), "Gemma3MultiModalProjector", _TOWER_AND_PROJECTOR
)
INTERNVL = TowerFamily(
    "internvl", _modeling("internvl"), "InternVLMultiModalProjector", _TOWER_AND_PROJECTOR
)
IDEFICS3 = TowerFamily(
    "idefics3", _modeling("idefics3"), "Idefics3Connector", _VISION_MODEL_AND_CONNECTOR
)
SMOLVLM = TowerFamily(
    "idefics3", _modeling("smolvlm"), "SmolVLMConnector", _VISION_MODEL_AND_CONNECTOR
)
QWEN2_AUDIO = TowerFamily(
    "audio",
    _modeling("qwen2_audio"),
    "Qwen2AudioMultiModalProjector",
    _both_layouts(("audio_tower.", "audio_tower."), ("multi_modal_projector.", "projector.")),
    config_field="audio_config",
)
