"""Sets of cases: the built-in grids, grids read from TOML files, their order, and choosing among them.

A TOML grid lists case ids, or products of lists for the parts of an id, or both:

    cases = ["dp1.tp1/local/bf16/t32.d64.f32/e8.k2/gate"]

    [[product]]
    parallel = ["dp2.tp1.ep", "dp1.tp2"]
    format = ["bf16", "f32"]
    sizes = ["t7.d64.f32"]
    routing = ["e8.k2", "e8.k3"]
    flags = ["", "shared+gate"]        # optional
    transport = ["allgather"]          # optional; derived: allgather with expert parallelism, else local
"""

from __future__ import annotations

import difflib
import itertools
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from parity.case import ACROSS_NODES, SLOTTED, Case, CaseError

PRODUCT_KEYS = ("parallel", "transport", "format", "sizes", "routing", "flags")
OPTIONAL_KEYS: dict[str, tuple] = {"flags": ("",), "transport": (None,)}


class GridError(ValueError):
    """An unknown grid, a bad grid file, or a choice that matches nothing; the message says what is allowed."""


def _smoke() -> list[Case]:
    """Every parallel mode and flag, both dtypes, odd sizes, uneven and empty ranks; small."""
    every_mode = [
        "dp1.tp1/local/{}/t13.d64.f48/e8.k2/gate",
        "dp1.tp2/local/{}/t13.d64.f48/e8.k2/gate+shared",
        "dp2.tp1/local/{}/t13.d64.f48/e8.k2/gate+shared",
        "dp2.tp2/local/{}/t7-5.d64.f48/e8.k2/gate+shared+latent",
        "dp2.tp1.ep/allgather/{}/t13.d64.f48/e8.k2/gate+shared",
        "dp4.tp1.ep/allgather/{}/t5-0-7-1.d64.f48/e8.k2/gate+shared+latent",
        "dp2.tp2.ep/allgather/{}/t13.d64.f48/e8.k2/gate+shared+latent",
        "dp2.tp2.ep.nosp/allgather/{}/t7-4.d64.f48/e8.k2/gate+shared+latent",
        "dp2.tp2.ep.native/allgather/{}/t7-4.d64.f48/e8.k2/gate+shared+latent",
    ]
    ids = [text.format(fmt) for text in every_mode for fmt in ("bf16", "f32")]
    ids += [
        # Token counts at the edges: one token, tp-1, tp, tp+1, ranks without any.
        "dp1.tp1/local/bf16/t1.d65.f33/e3.k1",
        "dp1.tp2.ep/allgather/bf16/t9.d64.f48/e8.k2/gate+shared",
        "dp1.tp2.ep.sp/allgather/bf16/t9.d64.f48/e8.k2/gate+shared",
        "dp2.tp2.ep/allgather/bf16/t1.d64.f48/e8.k2/shared",
        "dp2.tp2.ep/allgather/bf16/t3-1.d64.f48/e8.k2/shared",
        "dp2.tp2.ep/allgather/bf16/t7-3.d64.f48/e8.k2/shared",
        "dp2.tp2.ep.native/allgather/bf16/t0-3.d64.f48/e8.k2/shared",
        "dp2.tp2.ep.nosp/allgather/bf16/t0-5.d64.f48/e8.k2/shared",
        "dp2.tp1/local/bf16/t0-9.d64.f48/e8.k2",
        "dp4.tp1.ep/allgather/bf16/t0-0-11-0.d64.f48/e8.k2/shared",
        "dp4.tp1.ep/allgather/bf16/t50-20-26-3.d64.f48/e16.k6/shared+gate",
        "dp1.tp4/local/bf16/t31.d72.f52/e5.k3/shared+gate",
        # The transports that move each token once a rank: every mode they serve, drops, nodes, node-limited routing.
        "dp4.tp1.ep/ragged/bf16/t5-0-7-1.d64.f48/e8.k2/gate+shared+latent",
        "dp4.tp1.ep/padded/bf16/t5-0-7-1.d64.f48/e8.k2/gate+shared+latent",
        "dp2.tp2.ep/ragged/bf16/t7-3.d64.f48/e8.k2/shared",
        "dp2.tp2.ep/padded/f32/t7-3.d64.f48/e8.k2/shared",
        "dp2.tp2.ep.native/ragged/f32/t7-4.d64.f48/e8.k2",
        "dp2.tp2.ep.native/padded/bf16/t7-4.d64.f48/e8.k2",
        "dp4.tp1.ep.nodes2/ragged/bf16/t5-0-7-1.d64.f48/e8.k3/gate+sigmoid+groups2-1+bias",
        "dp4.tp1.ep.nodes2/padded/bf16/t5-0-7-1.d64.f48/e4.k4",
        "dp4.tp1.ep/padded/bf16/t9.d64.f48/e8.k2/hot+capacity0.5",
        "dp4.tp1.ep/ragged/bf16/t9.d64.f48/e8.k2/hot+maxrows10",
        "dp2.tp1.ep/ragged/bf16/t1.d64.f48/e2.k2/weightin+sigmoid+gate",
        "dp2.tp1.ep/one_sided/bf16/t5-0.d64.f48/e8.k2/gate+shared+latent",
        # One flag after another, on the modes that could get it wrong.
        "dp2.tp2.ep/allgather/bf16/t6.d64.f48/e8.k3/gate+sigmoid+renorm+scale2.5",
        "dp2.tp2.ep/allgather/bf16/t6.d64.f48/e8.k3/ids",
        "dp1.tp2/local/bf16/t6.d64.f48/e8.k3/shared2+sharedgate+gate",
        "dp2.tp1.ep/allgather/bf16/t6.d64.f48/e16.k3/gate+sigmoid+renorm+groups4-2+bias+scale2.5",
        "dp1.tp2/local/bf16/t6.d64.f48/e8.k3/gelu_tanh+shared",
        "dp2.tp1.ep/allgather/bf16/t6.d64.f48/e8.k3/relu2+shared",
        "dp1.tp2/local/bf16/t6.d64.f48/e8.k3/ungated+shared",
        "dp1.tp2/local/bf16/t6.d64.f48/e8.k3/gelu+interleaved+shared",
        "dp2.tp1.ep/allgather/bf16/t6.d64.f48/e8.k3/swigluoai+interleaved+alpha1.5+limit2+expertbias",
        "dp2.tp2.ep.nosp/allgather/bf16/t6.d64.f48/e8.k3/shared+expertbias",
        "dp1.tp2/local/bf16/t24.d64.f48/e8.k3/mean+seed3",
        "dp2.tp1.ep/allgather/bf16/t24.d64.f48/e8.k2/hot+gate+latent24",
        # Ties and near ties, of experts and groups, in both scorings.
        "dp2.tp2.ep/allgather/bf16/t13.d64.f48/e8.k3/gate+ties",
        "dp2.tp1.ep/ragged/bf16/t7-5.d64.f48/e16.k3/sigmoid+groups4-2+bias+ties",
        "dp1.tp2/local/f32/t19.d64.f48/e8.k2/gate+sigmoid+bias+ties",
        "dp2.tp2.ep/padded/bf16/t13-6.d64.f48/e8.k3/gate+nearties",
        "dp2.tp1.ep/allgather/bf16/t7-9.d64.f48/e16.k3/sigmoid+groups4-2+bias+nearties",
        "dp1.tp2/local/f32/t19.d64.f48/e8.k2/sigmoid+nearties",
    ]
    return [Case.parse(text) for text in ids]


def _vllm() -> list[Case]:
    """The grid of vLLM's MoE layer test: its shapes, experts, top-k, layer options and parallel modes, in bf16.

    The other transports that serve a mode take their part with all layer options off and with all of them on. Modes
    which that test leaves out follow at its middle shape. `one_sided`, which takes a GPU for each rank, is not in it.
    """
    shapes = ("t1.d256.f128", "t32.d512.f512", "t222.d2048.f1024")
    flags = ("", "gate", "shared", "shared+latent", "shared+gate", "shared+gate+latent")
    routing = [f"e{e}.k{k}" for e in (8, 64) for k in (2, 6)]
    off_and_on = ("", "shared+gate+latent")
    crossing = ("dp2.tp1.ep", "dp4.tp1.ep", "dp2.tp2.ep")
    theirs = {("local",): ("dp1.tp1", "dp1.tp2", "dp1.tp4"), ("allgather",): crossing}
    left_out = {
        ("local",): ("dp2.tp1", "dp2.tp2"),
        ("allgather",): ("dp2.tp2.ep.nosp",),
        ("allgather", "ragged", "padded"): ("dp2.tp2.ep.native",),
    }

    def cases(modes: Mapping, sizes: Sequence[str], routing: Sequence[str], flags: Sequence[str]) -> list[Case]:
        out = []
        for transports, parallel in modes.items():
            parts = {"parallel": parallel, "transport": transports, "format": ("bf16",)}
            out += product(parts | {"sizes": sizes, "routing": routing, "flags": flags})
        return out

    return [
        *cases(theirs, shapes, routing, flags),
        *cases({("ragged", "padded"): crossing}, shapes, routing, off_and_on),
        *cases(left_out, shapes[1:2], ("e8.k2", "e64.k6"), off_and_on),
    ]


def _transports() -> list[Case]:
    """Every transport that crosses ranks on 2, 3, 4 and 8 of them, where one of them could go wrong alone.

    One, three and twelve experts a rank, top-k up to all experts, ranks without tokens, one token in all, every token
    to one expert, drops, two nodes.
    """
    meshes = ("dp2.tp1.ep", "dp3.tp1.ep", "dp4.tp1.ep", "dp8.tp1.ep", "dp1.tp3.ep.sp", "dp2.tp2.ep", "dp2.tp4.ep",
              "dp2.tp2.ep.native", "dp4.tp1.ep.nodes2", "dp8.tp1.ep.nodes2", "dp2.tp2.ep.nodes2")  # fmt: skip
    out = []
    for mesh in meshes:
        dp, tp = (int(part[2:]) for part in mesh.split(".")[:2])
        ranks = dp * tp
        uneven = "-".join(str(count) for count in (11, 0, 5, 1, 0, 9, 2, 3)[:dp])
        single = "-".join(["0"] * (dp - 1) + ["1"])
        scenarios = [
            (f"t{uneven}", f"e{ranks}.k{ranks}", "gate+shared"),
            (f"t{uneven}", f"e{3 * ranks}.k2", "latent+gate"),
            (f"t{single}", f"e{12 * ranks}.k6", ""),
            ("t7", f"e{ranks}.k1", "hot"),
            ("t7", f"e{2 * ranks}.k2", f"gate+sigmoid+bias+groups{ranks}-{max(1, ranks // 2)}"),
        ]
        for transport in ("allgather", "ragged", "padded", "one_sided"):
            if ".nodes" in mesh and transport not in ACROSS_NODES:
                continue
            slots = dict.fromkeys(SLOTTED, "hot+capacity0.6")
            drops = {"ragged": "hot+maxrows5", **slots}.get(transport)
            chosen = scenarios[:1] if transport == "one_sided" else scenarios  # what it delivers is what padded does
            for tokens, routing, flags in [*chosen, *([("t7", f"e{2 * ranks}.k2", drops)] if drops else [])]:
                text = f"{mesh}/{transport}/bf16/{tokens}.d64.f48/{routing}"
                out.append(Case.parse(text + (f"/{flags}" if flags else "")))
    return out


def _huggingface() -> list[Case]:
    """What the MoE blocks of Hugging Face transformers can express: each block's options, on some meshes of ours."""
    ids = [
        # Mixtral and Qwen3
        "dp1.tp1/local/f32/t13.d64.f48/e8.k2/gate+renorm",
        "dp2.tp2.ep/allgather/f32/t13-6.d64.f48/e8.k2/gate+renorm",
        "dp2.tp1/local/f32/t1-9.d64.f48/e8.k3/gate+renorm+gelu_tanh+mean",
        "dp2.tp1.ep/padded/f32/t13-6.d64.f48/e8.k2/gate",
        # DeepSeek-V3
        "dp1.tp1/local/f32/t13.d64.f48/e16.k4/shared+gate+sigmoid+renorm+groups4-2+bias+scale2.5",
        "dp2.tp2.ep/ragged/f32/t7-5.d64.f48/e16.k4/shared2+gate+sigmoid+renorm+groups8-4+bias+scale2.5",
        "dp1.tp2/local/f32/t9.d64.f48/e8.k2/gate+sigmoid+bias+gelu",
        # gpt-oss; a limit that is reached
        "dp1.tp1/local/f32/t13.d64.f48/e8.k2/gate+renorm+swigluoai+interleaved+expertbias",
        "dp2.tp2.ep/allgather/f32/t13-6.d64.f48/e8.k4/gate+renorm+swigluoai+interleaved+alpha1.5+limit0.5+expertbias",
    ]
    return [Case.parse(text) for text in ids]


def _determinism() -> list[Case]:
    """Every transport, and every kind of reduction across ranks; uneven ranks."""
    ids = (  # mostly float32: in bfloat16 the last rounding hides most of what differs
        "dp2.tp1/local/f32/t24-17.d64.f48/e8.k2/shared+gate",
        "dp1.tp2/local/f32/t24.d64.f48/e8.k2/shared",
        "dp1.tp4/local/f32/t24.d64.f48/e8.k2",
        "dp2.tp1.ep/allgather/bf16/t24-17.d64.f48/e8.k2/gate",
        "dp2.tp2.ep/allgather/f32/t24-17.d64.f48/e8.k2/shared",
        "dp2.tp1.ep/ragged/f32/t24-17.d64.f48/e8.k2",
        "dp2.tp1.ep/padded/f32/t24-17.d64.f48/e8.k2",
    )
    return [Case.parse(text) for text in ids]


BUILT_IN = {
    "smoke": _smoke,
    "vllm": _vllm,
    "transports": _transports,
    "determinism": _determinism,
    "huggingface": _huggingface,
}


def product(parts: Mapping[str, Sequence]) -> list[Case]:
    """All combinations of the parts of an id.

    Raises:
      CaseError: a combination cannot be built.
    """
    values = [parts[key] if key in parts else OPTIONAL_KEYS[key] for key in PRODUCT_KEYS]
    out = []
    for parallel, transport, fmt, sizes, routing, flags in itertools.product(*values):
        moved = transport or ("allgather" if ".ep" in parallel else "local")
        out.append(Case.parse("/".join([parallel, moved, fmt, sizes, routing, *([flags] if flags else [])])))
    return out


def load(name: str) -> list[Case]:
    """The cases of a built-in grid or of a TOML file, in the order they run.

    Raises:
      GridError: no such grid, or the file is malformed; the message names the key.
      CaseError: an id in the file cannot be read or built.
    """
    if name in BUILT_IN:
        return order(BUILT_IN[name]())
    if not name.endswith(".toml"):
        close = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise GridError(f"unknown grid {name!r}{hint}; allowed: {', '.join(BUILT_IN)}, or the path of a .toml file")
    return order(_read(Path(name)))


def _read(path: Path) -> list[Case]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GridError(f"grid file {str(path)!r} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GridError(f"grid file {str(path)!r} is not TOML: {error}") from error
    _known_keys(path, "at the top", data, ("cases", "product"))
    ids = data.get("cases", [])
    _strings(path, "cases", ids)
    out = [_named(path, f"cases[{index}]", lambda text=text: [Case.parse(text)]) for index, text in enumerate(ids)]
    tables = data.get("product", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise GridError(f"grid file {str(path)!r}: 'product' must be tables, written [[product]]")
    for index, table in enumerate(tables):
        where = f"product[{index}]"
        _known_keys(path, f"in {where}", table, PRODUCT_KEYS)
        for key in PRODUCT_KEYS:
            if key not in table and key not in OPTIONAL_KEYS:
                raise GridError(f"grid file {str(path)!r}: {where} lacks the key {key!r}")
            if key in table:
                _strings(path, f"{where}.{key}", table[key])
                if not table[key]:
                    raise GridError(f"grid file {str(path)!r}: {where}.{key} is empty")
        out.append(_named(path, where, lambda table=table: product(table)))
    cases = list(itertools.chain.from_iterable(out))
    if not cases:
        raise GridError(f"grid file {str(path)!r} has no cases; give 'cases' or a [[product]] table")
    return cases


def _named(path: Path, where: str, make) -> list[Case]:
    try:
        return make()
    except CaseError as error:
        raise GridError(f"grid file {str(path)!r}: {where}: {error}") from None


def _known_keys(path: Path, where: str, table: Mapping, allowed: Iterable[str]) -> None:
    for key in table:
        if key not in allowed:
            close = difflib.get_close_matches(key, list(allowed), n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise GridError(
                f"grid file {str(path)!r}: unknown key {key!r} {where}{hint}; allowed: {', '.join(allowed)}"
            )


def _strings(path: Path, where: str, value: object) -> None:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise GridError(f"grid file {str(path)!r}: {where} must be a list of strings, not {value!r}")


def order(cases: Iterable[Case]) -> list[Case]:
    """Neighbours share what is dear to make: expert weights first, then the oracle's answer. Duplicates go."""
    unique = {str(case): case for case in cases}.values()
    return sorted(unique, key=lambda case: (_weights_key(case), case.logical_id, case.world, str(case)))


def _weights_key(case: Case) -> tuple:
    size = case.experts * case.expert_width * case.intermediate
    shape = (case.experts, case.expert_width, case.intermediate, case.gated)
    return (size, case.format, shape, case.flags.expertbias, case.flags.mean, case.flags.seed)


def cost(case: Case) -> float:
    """About how long a case takes, in units of the smallest."""
    return 1 + case.experts * case.expert_width * case.intermediate / 2e7


def shard(cases: Sequence[Case], text: str) -> list[Case]:
    """One of N parts of about equal cost, which together are all cases; cases that share an answer stay together.

    Args:
      cases: in grid order, the same for every part.
      text: "I/N", the I-th (from 1) of N parts.

    Raises:
      GridError: the text is not such a pair, or the part is empty.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= parts:
        raise GridError(f"--shard {text!r} is not I/N with I from 1 to N, for example 2/3")
    loads, chosen = [0.0] * parts, []
    for _, group in itertools.groupby(cases, key=lambda case: case.logical_id):
        together = list(group)
        least = loads.index(min(loads))
        loads[least] += sum(map(cost, together))
        chosen += together if least == part - 1 else []
    if not chosen:
        raise GridError(f"--shard {text!r} of {len(cases)} cases is empty; use fewer parts")
    return chosen


def select(cases: Sequence[Case], text: str | None) -> list[Case]:
    """The cases whose id holds every word of `text`, in any case of letters.

    Raises:
      GridError: none does.
    """
    if not text or not text.split():
        return list(cases)
    words = text.lower().split()
    chosen = [case for case in cases if all(word in str(case).lower() for word in words)]
    if not chosen:
        raise GridError(f"-k {text!r} matches none of {len(cases)} cases; 'parity list' shows their ids")
    return chosen
