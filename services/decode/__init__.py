"""The decode stage: from a sequence's KV to its tokens."""
