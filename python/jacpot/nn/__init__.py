"""Layers whose weights are masked or sparse."""
