"""Array in, the same kind of array out: NumPy, PyTorch and CuPy."""
