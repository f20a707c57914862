"""What a picture becomes in the prompt, from its height and width alone: one rule per family.

`base` says what a rule gives · `grid` Qwen-VL · `fixed` LLaVA 1.5, Gemma 3 · `canvas` InternVL ·
`split` Idefics3, SmolVLM · `anyres` LLaVA-NeXT, LLaVA-OneVision. The gateway counts placeholders
with these rules and the encoder checks its image processor against them. No torch, no model.
"""
