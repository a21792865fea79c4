"""A case id in words."""

from __future__ import annotations

from dataclasses import fields

from parity.case import FLAGS, Case, CaseError, Flags

TRANSPORTS = {
    "local": "local: nothing moves",
    "allgather": "allgather: every token to every rank, sums scattered back",
    "ragged": "ragged: each token once to each rank that needs it, exact sizes",
    "padded": "padded: each token once to each rank that needs it, in fixed slots",
    "one_sided": "one_sided: as padded, stored by ranks into each other's memory",
}
MODES = {
    "single": "one rank",
    "DP": "tokens split, every rank holds every expert",
    "TP": "every rank holds a slice of every expert",
    "DP+TP": "tokens split over dp, every expert sliced over tp",
    "DP+EP": "tokens and experts split over the ranks",
    "EP+SP": "experts split over all ranks; the tp ranks share out their tokens, results are gathered",
    "EP+SP native": "experts split over all ranks; tokens come and go split over dp and tp",
    "EP, SP off": "experts split over all ranks; the tp ranks hold the same tokens",
}
FORMATS = {"bf16": "bfloat16", "f32": "float32"}
SPOKEN = frozenset({
    "shared", "sharedgate", "gate", "ids", "latent", "sigmoid", "renorm", "groups", "bias", "scale", "weightin",
    "activation", "ungated", "interleaved", "alpha", "limit", "expertbias", "capacity", "maxrows", "mean", "hot",
    "seed",
})  # fmt: skip
"""Flags that have words of their own below; others are shown with their meaning from `FLAGS`."""


def words(text: str) -> list[tuple[str, str]]:
    """What an id says, as (what, in words); empty if this parity cannot parse it."""
    try:
        case = Case.parse(text)
    except CaseError:
        return []
    mesh = f"{_count(case.dp, 'DP rank')} × {_count(case.tp, 'TP rank')}: {_count(case.world, 'rank')}"
    if case.nodes > 1:
        mesh += f" on {case.nodes} nodes"
    held = f"{case.experts // case.ep_size} on each of {case.ep_size} ranks" if case.ep else "all of them on every rank"
    out = [
        ("mesh", mesh),
        ("parallel mode", f"{case.mode}: {MODES.get(case.mode, '')}".removesuffix(": ")),
        (
            "transport",
            TRANSPORTS.get(case.transport, case.transport) + ("; across nodes first" if case.nodes > 1 else ""),
        ),
        ("format", FORMATS.get(case.format, case.format)),
        ("tokens", _tokens(case)),
        ("experts", f"{case.experts}, {held}; a token goes to {case.top_k}"),
        ("sizes", f"hidden {case.hidden}, intermediate {case.intermediate}"),
        ("router", _router(case)),
        ("expert", _expert(case)),
    ]
    if case.flags.shared:
        gate = ", with a sigmoid gate" if case.flags.sharedgate else ""
        out.append(("shared expert", f"width {case.shared_width}{gate}"))
    if case.flags.latent:
        out.append(("latent", f"experts work in a latent of width {case.flags.latent}"))
    if drops := _drops(case):
        out.append(("drops", drops))
    if arrays := _arrays(case):
        out.append(("arrays", arrays))
    for field in fields(Flags):
        if field.name not in SPOKEN and (value := getattr(case.flags, field.name)) != field.default:
            meaning = FLAGS.get(field.name, field.name)
            out.append((field.name, meaning if value is True else f"{meaning}: {value}"))
    return out


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _tokens(case: Case) -> str:
    if case.dp == 1:
        return f"{case.tokens[0]}"
    if len(set(case.tokens)) == 1:
        return f"{case.tokens[0]} on each DP rank, {case.total_tokens} in all"
    return f"{', '.join(map(str, case.tokens))} on DP ranks 0 to {case.dp - 1}; {case.total_tokens} in all"


def _router(case: Case) -> str:
    f = case.flags
    if f.ids:
        return "none: expert ids and weights are given"
    parts = ["logits computed by the layer" if f.gate else "logits given", "sigmoid" if f.sigmoid else "softmax"]
    if f.renorm:
        parts.append("renormalized")
    if f.groups != (1, 1):
        parts.append(f"{f.groups[1]} of {f.groups[0]} groups kept")
    if f.bias:
        parts.append("score-correction bias")
    if f.scale != 1.0:
        parts.append(f"scaled by {f.scale:g}")
    return ", ".join(parts)


def _expert(case: Case) -> str:
    f = case.flags
    parts = [("gated " if case.gated else "ungated ") + f.activation]
    if f.activation == "swigluoai":
        parts[0] += f" (alpha {f.alpha:g}, limit {f.limit:g})"
    if case.gated:
        parts.append(f"gate and up rows {'interleaved' if f.interleaved else 'concatenated'}")
    if f.expertbias:
        parts.append("with biases")
    parts.append(f"weighted on its {'input' if f.weightin else 'output'}")
    return ", ".join(parts)


def _drops(case: Case) -> str:
    f = case.flags
    if f.capacity:
        return f"room for {f.capacity:g} times the copies of an even spread; later ones are dropped"
    return f"a rank accepts {f.maxrows} copies of tokens in a hop; later ones are dropped" if f.maxrows else ""


def _arrays(case: Case) -> str:
    f = case.flags
    parts = ["with a mean that is not zero"] if f.mean else []
    parts += ["every token prefers the same experts"] if f.hot else []
    return ", ".join(parts + ([f"draw {f.seed}"] if f.seed else []))
