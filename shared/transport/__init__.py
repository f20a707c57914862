"""The data plane: tensors between processes, out of band, pulled by the receiver under a lease.

`base` the protocol · `lease` who may read what until when (pure) · `exposures` leases with their
memory · `landing_budget` all-or-nothing reservations (pure) · `landing` waiting for one · `ucx` the
real adapter: `wire` what it says, `ucx_pulls` and `ucx_sends` its two sides, `ucx_peers` endpoints,
`ucx_worker` the only importer of ucxx · `loopback` the in-process twin · `buffers` memory as bytes,
`tensors` tensors as memory (the only importer of torch).
"""
