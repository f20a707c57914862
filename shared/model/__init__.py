"""The engine: weights in, logits out. Nothing here knows about services, queues or transports."""
