"""The encode stage: pictures to embeddings."""
