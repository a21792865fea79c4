"""A case: one configuration of the layer on one mesh, named by an id that says everything and can be typed.

    dp2.tp2.ep/allgather/bf16/t222.d2048.f1024/e64.k6/shared+gate
    parallel  /transport/format/sizes          /routing/flags

- parallel: `dpA.tpB[.ep][.nodesN][.sp | .nosp | .native]`; without the last part, sequence parallelism is derived.
- sizes: `t222` is 222 tokens on every DP rank, `t5-0-7` gives each DP rank its own; `d` hidden, `f` intermediate.
- routing: `e` experts, `k` experts per token.
- flags, joined by `+`: see `FLAGS`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

FORMATS = ("bf16", "f32")
TRANSPORTS = ("local", "allgather", "ragged", "padded", "one_sided")
MODES = ("single", "DP", "TP", "DP+TP", "DP+EP", "EP+SP", "EP+SP native", "EP, SP off")
"""Every parallel mode, as `Case.mode` prints it."""
CAPABILITIES = {
    "local": frozenset({"single", "DP", "TP", "DP+TP"}),
    "allgather": frozenset({"DP+EP", "EP+SP", "EP+SP native", "EP, SP off"}),
    "ragged": frozenset({"DP+EP", "EP+SP", "EP+SP native"}),
    "padded": frozenset({"DP+EP", "EP+SP", "EP+SP native"}),
    "one_sided": frozenset({"DP+EP", "EP+SP", "EP+SP native"}),
}
"""Which transport serves which parallel mode; each package has the same table."""
CARRIES = dict.fromkeys(TRANSPORTS, frozenset(FORMATS))
"""Which formats each transport carries; likewise."""
ACROSS_NODES = frozenset({"ragged", "padded"})
"""Transports that can cross nodes first and fan out inside."""
SLOTTED = ("padded", "one_sided")
"""Transports with fixed slots for each pair of ranks."""
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai", "relu2")
SHAPE = "parallel/transport/format/sizes/routing[/flags]"
EXAMPLE = "dp2.tp2.ep/allgather/bf16/t222.d2048.f1024/e64.k6/shared+gate"

FLAGS = {
    "shared": "a shared expert; sharedN: N of them",
    "sharedgate": "a sigmoid gate on the shared expert",
    "gate": "the layer computes the router logits (else they are given)",
    "ids": "expert ids and weights are given (no router)",
    "latent": "experts work in a latent of half the hidden size; latentN: of N",
    "sigmoid": "sigmoid scoring (else softmax)",
    "renorm": "renormalize the top-k weights",
    "groupsG-K": "grouped top-k: G groups, K of them kept",
    "bias": "a score-correction bias: it selects, it never weighs",
    "scaleX": "routed scaling factor X",
    "weightin": "router weight on the experts' input (else on their output)",
    "gelu, gelu_tanh, swigluoai, relu2": "activation (else silu)",
    "ungated": "no gate/up pair (silu, gelu); relu2 is always ungated",
    "interleaved": "gate and up rows interleaved (else concatenated)",
    "alphaX, limitX": "swigluoai's alpha and limit",
    "expertbias": "biases in the experts",
    "capacityX": "padded, one_sided: room for X times the tokens of an even spread (else for all)",
    "maxrowsN": "ragged: a rank accepts N rows (else all)",
    "mean": "inputs and weights with a non-zero mean",
    "hot": "every token to the same experts",
    "ties": "choices that tie exactly: the lower expert, and the lower group, must win",
    "nearties": "choices within rounding of another: either may win, and not too often",
    "seedN": "another draw of every array",
}


class CaseError(ValueError):
    """A malformed or impossible case; the message shows the value and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What a case may switch on beside its sizes. Defaults are what an id without flags means."""

    shared: int = 0
    sharedgate: bool = False
    gate: bool = False
    ids: bool = False
    latent: int = 0
    """Latent width; -1 stands for half the hidden size until the case is built."""
    sigmoid: bool = False
    renorm: bool = False
    groups: tuple[int, int] = (1, 1)
    bias: bool = False
    scale: float = 1.0
    weightin: bool = False
    activation: str = "silu"
    ungated: bool = False
    interleaved: bool = False
    alpha: float = 1.702
    limit: float = 7.0
    expertbias: bool = False
    capacity: float = 0.0
    """Capacity factor of the padded transport; 0: room for everything."""
    maxrows: int = 0
    """Cap on the rows a rank accepts of the ragged transport; 0: none."""
    mean: bool = False
    hot: bool = False
    ties: bool = False
    nearties: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration on one mesh. Build it from an id with `Case.parse`; `str(case)` is the canonical id."""

    dp: int = 1
    tp: int = 1
    ep: bool = False
    nodes: int = 1
    """Groups of ranks that tokens enter once and fan out in."""
    sp: str | None = None
    """None (derived), "sp", "nosp" or "native"."""
    transport: str = "local"
    format: str = "bf16"
    tokens: tuple[int, ...]
    """Tokens on each DP rank."""
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    flags: Flags = field(default_factory=Flags)

    def __post_init__(self) -> None:
        if self.flags.latent == -1:
            object.__setattr__(self, "flags", replace(self.flags, latent=max(1, self.hidden // 2)))
        _validate(self)
        derived = "sp" if self.ep_size > self.tp > 1 else "nosp"
        if self.sp == derived:  # one configuration, one id
            object.__setattr__(self, "sp", None)

    # Derived sizes, as vLLM derives them.
    @property
    def world(self) -> int:
        return self.dp * self.tp

    @property
    def ep_size(self) -> int:
        return self.world if self.ep else 1

    @property
    def sequence_parallel(self) -> bool:
        """Whether the tp ranks split the tokens among themselves."""
        return self.ep_size > self.tp > 1 if self.sp is None else self.sp in ("sp", "native")

    @property
    def native(self) -> bool:
        """Whether the tokens come and go split over dp and tp."""
        return self.sp == "native"

    @property
    def expert_width(self) -> int:
        """Width of what an expert reads and writes: the latent's, or the hidden size."""
        return self.flags.latent or self.hidden

    @property
    def options(self) -> frozenset[str]:
        """Names of the flags that switch on a part of the layer, without their numbers; an activation by its name."""
        f = self.flags
        kept = {name for name in _OPTIONS if getattr(f, name) != getattr(Flags, name)}
        kept |= {f.activation} - {Flags.activation}
        return frozenset(kept - ({"ungated"} if f.activation == "relu2" else set()))

    @property
    def gated(self) -> bool:
        return not self.flags.ungated and self.flags.activation != "relu2"

    @property
    def shared_width(self) -> int:
        return self.flags.shared * self.intermediate

    @property
    def total_tokens(self) -> int:
        return sum(self.tokens)

    @property
    def rank_counts(self) -> tuple[int, ...]:
        """Tokens each rank routes itself, in rank order: a chunk under sequence parallelism, else its DP rank's all.

        Every DP rank's array has the rows of the longest, so chunks are of one size: t7-3 over tp 2 gives chunks of
        four, 4 and 3 tokens, then 3 and 0. Native tokens are cut by each DP rank's own count: 4 and 3, then 2 and 1.
        """
        if not self.sequence_parallel:
            return tuple(count for count in self.tokens for _ in range(self.tp))
        out = []
        for count in self.tokens:
            chunk = -(-(count if self.native else max(self.tokens)) // self.tp)
            out += [min(max(count - j * chunk, 0), chunk) for j in range(self.tp)]
        return tuple(out)

    @property
    def rows_per_rank(self) -> int:
        """Rows of the array that each rank routes, padding included: the same on every rank."""
        if not self.sequence_parallel or self.native:
            return max(self.rank_counts)
        return -(-max(self.tokens) // self.tp)

    @property
    def drops(self) -> bool:
        """Whether the transport may lose copies for want of room."""
        return bool(self.flags.capacity or self.flags.maxrows)

    @property
    def mode(self) -> str:
        """The parallel mode in words, a row of the grid."""
        if not self.ep:
            parts = [name for name, size in (("DP", self.dp), ("TP", self.tp)) if size > 1]
            return "+".join(parts) or "single"
        if self.native:
            return "EP+SP native"
        if self.sequence_parallel:
            return "EP+SP"
        return "EP, SP off" if self.tp > 1 else "DP+EP"

    @property
    def logical_id(self) -> str:
        """What the result depends on: the id without the mesh, unless the mesh decides what is dropped.

        Cases that share it share the oracle's answer.
        """
        if self.drops:
            return str(self)
        return "/".join(["t" + "-".join(map(str, self.tokens)), self.format, self._sizes(tokens=False),
                         f"e{self.experts}.k{self.top_k}", self._flags()])  # fmt: skip

    def __str__(self) -> str:
        parallel = f"dp{self.dp}.tp{self.tp}" + (".ep" if self.ep else "")
        parallel += (f".nodes{self.nodes}" if self.nodes > 1 else "") + (f".{self.sp}" if self.sp else "")
        parts = [parallel, self.transport, self.format, self._sizes(), f"e{self.experts}.k{self.top_k}"]
        return "/".join(parts + ([self._flags()] if self._flags() else []))

    def _sizes(self, tokens: bool = True) -> str:
        uniform = len(set(self.tokens)) == 1
        counts = str(self.tokens[0]) if uniform else "-".join(map(str, self.tokens))
        return (f"t{counts}." if tokens else "") + f"d{self.hidden}.f{self.intermediate}"

    def _flags(self) -> str:
        f, out = self.flags, []
        if f.shared:
            out.append("shared" if f.shared == 1 else f"shared{f.shared}")
        out += ["sharedgate"] * f.sharedgate + ["gate"] * f.gate + ["ids"] * f.ids
        if f.latent:
            out.append("latent" if f.latent == max(1, self.hidden // 2) else f"latent{f.latent}")
        out += ["sigmoid"] * f.sigmoid + ["renorm"] * f.renorm
        if f.groups != (1, 1):
            out.append(f"groups{f.groups[0]}-{f.groups[1]}")
        out += ["bias"] * f.bias
        if f.scale != 1.0:
            out.append(f"scale{f.scale:g}")
        out += ["weightin"] * f.weightin
        if f.activation != "silu":
            out.append(f.activation)
        out += ["ungated"] * (f.ungated and f.activation != "relu2") + ["interleaved"] * f.interleaved
        if f.alpha != Flags.alpha:
            out.append(f"alpha{f.alpha:g}")
        if f.limit != Flags.limit:
            out.append(f"limit{f.limit:g}")
        out += ["expertbias"] * f.expertbias
        if f.capacity:
            out.append(f"capacity{f.capacity:g}")
        if f.maxrows:
            out.append(f"maxrows{f.maxrows}")
        out += ["mean"] * f.mean + ["hot"] * f.hot + ["ties"] * f.ties + ["nearties"] * f.nearties
        if f.seed:
            out.append(f"seed{f.seed}")
        return "+".join(out)

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read a case id.

        Args:
          text: for example `dp2.tp2.ep/allgather/bf16/t222.d2048.f1024/e64.k6/shared+gate`.

        Raises:
          CaseError: the id is malformed, or names something that cannot be built; the message says which part.
        """
        parts = text.strip().split("/")
        if not 5 <= len(parts) <= 6:
            raise CaseError(f"case {text!r} has {len(parts)} parts; an id is {SHAPE}, for example {EXAMPLE}")
        try:
            parallel = _parse_parallel(parts[0])
            dp = parallel["dp"]
            return cls(
                **parallel,
                transport=_one_of("transport", parts[1], TRANSPORTS),
                format=_one_of("format", parts[2], FORMATS),
                **_parse_sizes(parts[3], dp),
                **_parse_routing(parts[4]),
                flags=_parse_flags(parts[5]) if len(parts) == 6 else Flags(),
            )
        except CaseError as error:
            raise CaseError(f"case {text!r}: {error}") from None


def _nearest(word: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    allowed = tuple(allowed)
    if value not in allowed:
        raise CaseError(f"unknown {name} {value!r}{_nearest(value, allowed)}; allowed: {', '.join(allowed)}")
    return value


def _parse_parallel(text: str) -> dict:
    match = re.fullmatch(r"dp(\d+)\.tp(\d+)(\.ep)?(?:\.nodes(\d+))?(?:\.(sp|nosp|native))?", text)
    if not match:
        raise CaseError(f"parallel part {text!r} is not dpA.tpB[.ep][.nodesN][.sp|.nosp|.native], as in dp2.tp2.ep")
    dp, tp, ep, nodes, sp = match.groups()
    if int(dp) < 1 or int(tp) < 1:
        raise CaseError(f"parallel part {text!r}: dp and tp must be at least 1")
    return {"dp": int(dp), "tp": int(tp), "ep": bool(ep), "nodes": int(nodes or 1), "sp": sp}


def _parse_sizes(text: str, dp: int) -> dict:
    match = re.fullmatch(r"t(\d+(?:-\d+)*)\.d(\d+)\.f(\d+)", text)
    if not match:
        raise CaseError(f"sizes part {text!r} is not tT.dD.fF, for example t222.d2048.f1024 or t5-0-7.d64.f32")
    counts = tuple(int(count) for count in match[1].split("-"))
    if len(counts) == 1:
        counts *= dp
    if len(counts) != dp:
        raise CaseError(
            f"sizes part {text!r} gives {len(counts)} token counts for {dp} DP ranks; give one, or one each"
        )
    return {"tokens": counts, "hidden": int(match[2]), "intermediate": int(match[3])}


def _parse_routing(text: str) -> dict:
    match = re.fullmatch(r"e(\d+)\.k(\d+)", text)
    if not match:
        raise CaseError(f"routing part {text!r} is not eE.kK, for example e64.k6")
    return {"experts": int(match[1]), "top_k": int(match[2])}


_NUMBER = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"
_VALUED = {
    "shared": (r"shared(\d+)", lambda m: int(m[1])),
    "latent": (r"latent(\d+)", lambda m: int(m[1])),
    "groups": (r"groups(\d+)-(\d+)", lambda m: (int(m[1]), int(m[2]))),
    "scale": (rf"scale{_NUMBER}", lambda m: float(m[1])),
    "alpha": (rf"alpha{_NUMBER}", lambda m: float(m[1])),
    "limit": (rf"limit{_NUMBER}", lambda m: float(m[1])),
    "capacity": (rf"capacity{_NUMBER}", lambda m: float(m[1])),
    "maxrows": (r"maxrows(\d+)", lambda m: int(m[1])),
    "seed": (r"seed(\d+)", lambda m: int(m[1])),
}
_ABOUT_ARRAYS = ("mean", "hot", "ties", "nearties", "seed")
"""Flags that decide what is in the arrays, and not what the layer does with them."""
_OPTIONS = tuple(f.name for f in fields(Flags) if f.name not in ("activation", *_ABOUT_ARRAYS))
_SWITCHES = tuple(f.name for f in fields(Flags) if f.type == "bool")


def _parse_flags(text: str) -> Flags:
    values: dict = {}

    def put(name: str, value: object, word: str) -> None:
        if name in values:
            raise CaseError(f"flag {word!r} sets {name} a second time")
        values[name] = value

    for word in text.split("+"):
        if word in _SWITCHES:
            put(word, True, word)
        elif word == "shared":
            put("shared", 1, word)
        elif word == "latent":
            put("latent", -1, word)
        elif word in ACTIVATIONS:
            put("activation", word, word)
        else:
            for name, (pattern, convert) in _VALUED.items():
                if match := re.fullmatch(pattern, word):
                    put(name, convert(match), word)
                    break
            else:
                known = [part.strip() for key in FLAGS for part in key.split(",")]
                raise CaseError(f"unknown flag {word!r}{_nearest(word, known)}; allowed: {', '.join(known)}")
    return Flags(**values)


def _validate(case: Case) -> None:
    f = case.flags
    _one_of("transport", case.transport, TRANSPORTS)
    _one_of("format", case.format, FORMATS)
    for name in ("hidden", "intermediate", "experts", "top_k"):
        if getattr(case, name) < 1:
            raise CaseError(f"{name} is {getattr(case, name)}; it must be at least 1")
    if len(case.tokens) != case.dp:
        raise CaseError(f"tokens {case.tokens} give {len(case.tokens)} counts for {case.dp} DP ranks")
    if case.total_tokens == 0:
        raise CaseError("no rank has a token; at least one DP rank must have one, or there is nothing to compare")
    if case.top_k > case.experts:
        raise CaseError(f"top-k is {case.top_k} of {case.experts} experts; it must be 1 to {case.experts}")
    if case.sp is not None and case.sp != "nosp":
        if not case.ep:
            raise CaseError(f"'.{case.sp}' is sequence parallelism, which needs expert parallelism: add '.ep'")
        if case.tp == 1:
            raise CaseError(f"'.{case.sp}' is sequence parallelism, which splits tokens over tp ranks: tp must be > 1")
    if case.mode not in CAPABILITIES[case.transport] and not (case.transport == "local" and case.ep_size == 1):
        serving = ", ".join(name for name in TRANSPORTS if case.mode in CAPABILITIES[name])
        why = {"local": "it moves nothing", "allgather": "it needs expert parallelism ('.ep')"}.get(
            case.transport, "it needs expert parallelism, with different tokens on every rank (SP where tp > 1)"
        )
        raise CaseError(f"transport {case.transport!r} cannot serve mode {case.mode!r}: {why}; allowed: {serving}")
    if case.nodes < 1 or case.dp % case.nodes:
        raise CaseError(f"{case.nodes} nodes do not divide {case.dp} DP ranks; use a divisor")
    if case.nodes > 1 and case.transport not in ACROSS_NODES:
        raise CaseError(f"transport {case.transport!r} knows no nodes; allowed: {', '.join(sorted(ACROSS_NODES))}")
    if f.capacity and case.transport not in SLOTTED:
        raise CaseError(f"flag 'capacityX' belongs to transports {', '.join(SLOTTED)}, not to {case.transport!r}")
    if f.maxrows and case.transport != "ragged":
        raise CaseError(f"flag 'maxrowsN' belongs to transport 'ragged', not to {case.transport!r}")
    if case.experts % case.ep_size:
        raise CaseError(f"{case.experts} experts do not divide over {case.ep_size} EP ranks (dp * tp); use a multiple")
    if not case.ep and case.intermediate % case.tp:
        raise CaseError(
            f"intermediate size {case.intermediate} does not divide over {case.tp} TP ranks; use a multiple"
        )
    if case.tp > 1 and not case.sequence_parallel and case.shared_width % case.tp:
        raise CaseError(f"shared expert width {case.shared_width} does not divide over {case.tp} TP ranks")
    if f.gate and f.ids:
        raise CaseError("flags 'gate' and 'ids' exclude each other: logits are computed, or ids are given")
    if f.ids and (f.sigmoid or f.renorm or f.bias or f.groups != (1, 1) or f.scale != 1.0):
        raise CaseError(
            "flag 'ids' gives ids and weights as they are; sigmoid, renorm, bias, groups and scale need a router"
        )
    if f.ties or f.nearties:
        flag = "ties" if f.ties else "nearties"
        if f.ties and f.nearties:
            raise CaseError("flags 'ties' and 'nearties' exclude each other: a choice is tied, or nearly")
        if f.ids or f.hot:
            raise CaseError(f"flag {flag!r} plants choices of a router; 'ids' has none, and 'hot' makes all alike")
        if case.top_k == case.experts:
            raise CaseError(f"flag {flag!r} needs experts that are not chosen; top-k is {case.top_k} of {case.experts}")
        if f.gate and case.hidden < 8:
            raise CaseError(f"flag {flag!r} with 'gate' needs a hidden size of 8 or more, not {case.hidden}")
    if f.sharedgate and not f.shared:
        raise CaseError("flag 'sharedgate' needs 'shared'")
    groups, kept = f.groups
    if groups < 1 or case.experts % groups:
        raise CaseError(f"{case.experts} experts do not divide into {groups} groups")
    if not 1 <= kept <= groups:
        raise CaseError(f"groups{groups}-{kept} keeps {kept} of {groups} groups; it must be 1 to {groups}")
    if kept * (case.experts // groups) < case.top_k:
        raise CaseError(
            f"groups{groups}-{kept} leaves {kept * (case.experts // groups)} experts for a top-k of {case.top_k}"
        )
    if f.activation in ("swigluoai", "gelu_tanh") and f.ungated:
        raise CaseError(f"activation {f.activation!r} is gated; ungated activations: silu, gelu, relu2")
    if f.interleaved and not case.gated:
        raise CaseError("flag 'interleaved' orders gate and up rows; an ungated expert has no such pair")
    if (f.alpha != Flags.alpha or f.limit != Flags.limit) and f.activation != "swigluoai":
        raise CaseError("flags 'alphaX' and 'limitX' belong to activation 'swigluoai'")
    if not (f.scale > 0 and f.limit > 0):
        raise CaseError(f"scale {f.scale:g} and limit {f.limit:g} must be positive")
