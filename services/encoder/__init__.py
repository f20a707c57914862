"""The encode stage: pictures and sounds to embeddings."""
