"""Slow twins: the same computations written the plain way, mostly in float64, for comparison."""
