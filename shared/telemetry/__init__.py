"""What a process tells about itself.

`names` every span's name · `tracing` spans and their propagation · `bus_spans` spans over the bus ·
`metrics` Prometheus metrics per stage · `logs` structured log lines · `http` /metrics and /health.
"""
