"""Makers of what tests need: models, checkpoints, tokenizers, folders, result rows, a hub."""
