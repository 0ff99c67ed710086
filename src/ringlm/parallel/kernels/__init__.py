"""Products with packed weights on the CPU, compiled for the machine at hand by numba. Knows pointers and sizes; no
tensors, no shards."""
