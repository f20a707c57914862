"""The prefill stage: prompts and embeddings to KV blocks and a first token."""
