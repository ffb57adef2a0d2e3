"""Masks, pruning and the search for lottery tickets."""
