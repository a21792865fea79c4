"""The verdict on a case: do the frameworks compute what the oracle computes, and the same thing as each other?

Gates, all of which must hold; each is named in the result:
- `sane`: shapes, dtypes, no NaN or infinity, padding rows zero; the reference is not trivial, every expert used.
- `exact`: which rank routed which tokens, the chosen experts (as sets), rows of each expert and their order, load
  counts, equal bits on tp replicas and on a repeated run.
- `router`: logits and weights within their bounds.
- `oracle`: the output against the oracle, per token, per expert, per rank and per element, within the derived bound.
- `frameworks`: the frameworks against each other, within sqrt(2) of the bound.
- `sensitive`: the bound is small enough to see any single expert go missing.
"""

from parity.verdict.gate import GATES as GATES
from parity.verdict.gate import Gate as Gate
from parity.verdict.judge import Judgement as Judgement
from parity.verdict.judge import judge as judge
