"""Other people's code, for comparison: besides tests, the only place that may import transformers or kvpress."""
