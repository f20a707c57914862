"""Benchmarks: each prints a table with a ratio measured in one run. `python -m bench` lists
them."""
