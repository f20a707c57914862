"""What a CUDA device gets: Triton kernels, graphs, and changed towers.

`fused`, `backend`, the graphs and `tower_layouts` can be imported where triton is missing; nothing
here is used on the CPU. The kernels' results are tested under Triton's interpreter, and wherever
there is a GPU on it.
"""
