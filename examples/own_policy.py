"""A new policy in one file: VATP (Guo et al., 2024, arXiv 2406.12335), attention times the size of the value it brings in.

The class is all there is to it; main compares it with another method at equal budgets. docs/policies.md explains the seam.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import restkv
from restkv.observe import Observation, weighted_attention


@dataclass(frozen=True)
class VATP(restkv.Policy):
    """Score = attention of the last `window` queries, times ||v||_1. Higher stays."""

    name: ClassVar[str] = "vatp"

    window: int = 2  # the newest queries: what is asked
    sinks: int = 4

    def importance(self, obs: Observation) -> Tensor:
        attention_BHC = weighted_attention(obs, (obs.q_pos >= 0).to(obs.dtype))
        value_BKC = obs.v.to(obs.dtype).abs().sum(-1)
        return attention_BHC * value_BKC.repeat_interleave(obs.group, 1)


def main() -> None:
    lm = restkv.load("restkv/assets/recall-mini")
    with open("restkv/assets/recall-mini/story.txt", encoding="utf-8") as file:
        prompt = file.read().strip()  # ends with "The code of the iron latch is", which is 84669
    for policy in (VATP(budget=64), restkv.StreamingLLM(budget=64)):
        answer = lm.generate(prompt, policy, max_new_tokens=3)
        print(
            f"{policy.name}: {answer.text.strip()} from {answer.stats.max_kept} of {answer.stats.seen[0]} entries per head"
        )


if __name__ == "__main__":
    main()
