"""What a medium becomes in the prompt, from its size or length alone: one rule per family.

`base` says what a rule gives · `grid` Qwen-VL · `fixed` LLaVA 1.5, Gemma 3 · `canvas` InternVL ·
`split` Idefics3, SmolVLM · `anyres` LLaVA-NeXT, LLaVA-OneVision · `clip` videos of Qwen-VL ·
`sound` Qwen2-Audio. The gateway counts placeholders with these rules and the encoder checks its
processors against them. No torch, no model.
"""
