"""Compiled CPU kernels: numba turns them into machine code for the CPU at hand, cached on disk.

Everything here is optional: without numba, or on another kind of CPU, the model runs on torch's own
operators (`shared/model/linear.py` and `shared/model/attention.py` choose).
"""
