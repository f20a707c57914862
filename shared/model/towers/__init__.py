"""Towers: pictures or sounds in, embedding rows out. Transformers' modules, our packing.

`pixels` and `spectrogram` what goes in · `build` makes a family's tower without weights · `base`
what every tower does · `patches` Qwen-VL · `tiles` towers with one picture size, of which `llava`,
`anyres`, `internvl` and `projected` (Gemma 3, Idefics3, SmolVLM) differ in what follows the tower ·
`audio` Qwen2-Audio.
transformers is imported only when a tower is built, so that prefill and decode processes never
import it.
"""
