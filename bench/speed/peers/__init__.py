"""Other people's code, for comparison: besides tests, the only package that may import transformers or kvpress."""
