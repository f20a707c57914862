"""The message bus: work queues that survive a worker, events that need not.

`base` the protocol · `subjects` every name · `limits` every bound · `dead_letters` what was given
up · `nats_bus` NATS JetStream · `memory_bus` the in-process twin.
"""
