"""The paged KV cache: who owns which block (pure), and the tensors behind the blocks (torch)."""
