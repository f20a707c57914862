"""Everything that travels over the bus: one frozen message per hop, never a tensor.

`descriptor` what a request is · `refs` where a tensor waits · `work` one task per stage ·
`events` what the gateway hears back · `control` registrations, cancellation, liveness · `codec`
bytes.
"""
