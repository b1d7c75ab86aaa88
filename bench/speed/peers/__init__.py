"""Other people's code, to compare with and to convert models: besides tests, all that may import transformers or kvpress."""
