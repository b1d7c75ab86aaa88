"""Measurements, and the training of the checkpoint that ships. Run one as `python -m bench.NAME`."""
