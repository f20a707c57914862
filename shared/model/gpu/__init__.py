"""Triton kernels for CUDA and what is built on them.

They have been run under Triton's interpreter on the CPU and compiled for Hopper (sm_90), and have
not run on a GPU yet: their results are tested, their speed is not known. `fused`, `backend` and
`decode_graphs` can be imported where triton is missing; nothing here is used on the CPU.
"""
