"""A worker process that hosts any set of stages."""
