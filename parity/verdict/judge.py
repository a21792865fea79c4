"""The verdict on a case."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from parity.case import Case
from parity.oracle import Reference
from parity.results import RankResult
from parity.stages import NAMES
from parity.tolerance import SENSITIVITY, ErrorModel
from parity.verdict.gate import GATES, Gate
from parity.verdict.layout import assemble
from parity.verdict.numbers import Side, between, compare, nontrivial, numbers, output, routing, sensitive
from parity.verdict.stages import stages
from parity.verdict.structure import not_checked, structure, whole
from parity.verdict.tally import INFINITE


@dataclass(frozen=True)
class Judgement:
    """What a case comes to: "pass" or "fail", why, every gate, and numbers for the report."""

    verdict: str
    reason: str
    gates: list[Gate]
    metrics: dict = field(default_factory=dict)

    def blamed(self, framework: str) -> tuple[str, float]:
        """The first stage that a failed gate of a framework names, and how far off it is over its bound.

        Returns:
          The stage ("" where none is named) and the largest margin of the gates that name it; INFINITE where one of
          them allows nothing, so that it has no margin.
        """
        failed = [gate for gate in self.gates if not gate.passed and gate.framework == framework and gate.stage]
        if not failed:
            return "", 0.0
        stage = min((gate.stage for gate in failed), key=NAMES.index)
        margins = [INFINITE if gate.margin is None else gate.margin for gate in failed if gate.stage == stage]
        return stage, min(max(margins), INFINITE)


def judge(case: Case, reference: Reference, results: Mapping[str, Sequence[RankResult]]) -> Judgement:
    """Hold every framework's ranks against the oracle and against each other.

    Args:
      case: what was run.
      reference: the oracle's answer for it.
      results: framework -> the results of ranks 0 to world - 1.
    """
    model = ErrorModel(case.format)
    gates = [nontrivial(case, reference), sensitive(case, reference, model)]
    metrics: dict = {"frameworks": {}, "sensitivity": gates[-1].margin and gates[-1].margin * SENSITIVITY}
    sides: dict[str, Side] = {}
    for name, ranks in results.items():
        found = structure(case, reference, name, ranks)
        gates += found
        if not all(gate.passed for gate in found if gate.gate == "sane"):
            # numbers of the wrong shape or kind cannot be compared, but if only y is, the stages before it can
            if (decisions := whole(case, ranks)) is not None:
                chosen = assemble(case, decisions, "topk_ids")
                more, table = stages(case, reference, reference, chosen, name, ranks)
                gates += more
                metrics["frameworks"][name] = {"stages": table}
            continue
        side = Side.of(case, reference, ranks, model)
        sides[name] = side
        gates += routing(case, side, name, model) + output(case, side, name, model)
        found, table = stages(case, reference, side.reference, side.ids, name, ranks)
        gates += found
        metrics["frameworks"][name] = numbers(case, side, model) | {"not_checked": not_checked(reference, ranks)}
        metrics["frameworks"][name]["stages"] = table
    for one, other in itertools.combinations(sides, 2):
        gates.append(between(case, (one, sides[one]), (other, sides[other]), model))
        metrics[f"{one} vs {other}"] = compare(sides[one], sides[other])
    failed = [gate for gate in gates if not gate.passed]
    failed.sort(key=lambda gate: GATES.index(gate.gate))
    # A stage that passes is left out: its elements are held to one rounding, which the largest of many comes near.
    margins = [
        gate.margin
        for gate in gates
        if gate.margin is not None and gate.gate != "sensitive" and not (gate.gate == "stages" and gate.passed)
    ]
    metrics["margin"] = max(margins, default=0.0)
    reason = f"{failed[0].gate}: {failed[0].framework}: {failed[0].detail}" if failed else ""
    return Judgement("fail" if failed else "pass", reason, gates, metrics)
