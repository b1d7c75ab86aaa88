"""Three small tasks for lm-evaluation-harness: a choice, a text to score, an answer to generate."""

from __future__ import annotations

from restkv.cli.options import RECALL

STORY = (RECALL / "story.txt").read_text(encoding="utf-8").strip()


TEXTS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw",
    "The code of the red hat is 48213. Tom and his dog went home. The code of the red hat is",
    "Tim had a big, blue ball. He liked to kick it. His mom said: do not kick the ball in the house! But Tim did not",
    "<s>A bird sat in a tree.\n\nThe tree was old and ",  # a BOS of its own, a blank line, a space at the end
    "Anna",
]


CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rolling.json}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""


ANSWER = """
task: tiny_answer
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/answer.json}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: [".", " the "], max_gen_toks: 40, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


TASKS = ("tiny_choice", "tiny_rolling", "tiny_answer")
