"""Measurements, and the training of the checkpoint that ships. `restkv bench` runs them."""
