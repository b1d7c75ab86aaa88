"""The published benchmarks on the user's own copies of their files: LongBench, RULER, needle in a haystack, InfiniteBench.

Nothing of them is bundled: data are read from a folder, prompt templates from a clone of the benchmark's repository
(templates.py) or, without one, worded in our own way (wording.py), which every result then says. docs/published-benchmarks.md
"""
