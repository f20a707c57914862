"""The data plane: tensors between processes, out of band, pulled by the receiver under a lease.

`base` the protocol · `lease` who may read what until when (pure) · `ucx` the real adapter (the only
importer of ucxx) · `loopback` the in-process twin.
"""
