"""Each operation in plain PyTorch, written to be read: the oracle of every test."""
