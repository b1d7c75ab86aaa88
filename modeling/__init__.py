"""PyTorch definitions of the supported models, and what loads, feeds and caches them. Knows nothing of eviction."""
