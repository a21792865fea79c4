"""Routing without a chain of small launches: top-k of the scores, the sort by expert, and the work list.

Shape suffixes: t tokens, E experts, K experts per token, e experts of this rank, N = t * K pairs, B blocks of pairs.

A pair's row is the number of pairs that come before it by (expert, pair); a pair that is not here counts as one of an
expert past the last, so the rows of all pairs are distinct. For few pairs each program counts that directly. For many,
blocks of pairs are counted by expert, the counts are summed over blocks, and a pair adds its rank in its own block:
three passes, no sort, no atomics, the order of a stable sort.

Within a block 32 pairs are compared at once. Bit b of their experts is one word, a plane; a few bitwise operations for
each plane give the pairs of an expert, or those up to it, as the bits of a word, which are then counted.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_moe.kernels.schedule import FIELDS, rows_bound, tile_bound

_WHOLE = pl.BlockSpec(memory_space=pl.ANY)
SMALL = 2048  # pairs up to which every program counts all of them
WORD = 32  # pairs compared at once beyond that
BLOCK = 4 * WORD  # pairs of a block: one warp's, so that no plane leaves its registers


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


LOWEST, HIGHEST = -(2**31), 2**31 - 1


def _ordered(x):
    """int32 in the order of float32 values, above LOWEST, a NaN above everything."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(x != x, HIGHEST, jnp.where(bits < 0, bits ^ HIGHEST, bits))


class _Lanes:
    """Where experts lie among the lanes of a row: group by group, each padded to a power of two, and so are groups."""

    def __init__(self, experts: int, num_groups: int):
        self.size = experts // num_groups
        self.groups, self.width = _power_of_two(num_groups), _power_of_two(self.size)
        lane = lax.broadcasted_iota(jnp.int32, (1, self.groups * self.width), 1)
        group, member = lax.div(lane, jnp.int32(self.width)), lax.rem(lane, jnp.int32(self.width))
        self.expert = group * self.size + member
        self.real = (group < num_groups) & (member < self.size)


def _keep_groups(selection, lanes: _Lanes, groups_kept: int, top_two: bool):
    """-inf for all but the best groups, as reference.keep_groups."""
    tokens = selection.shape[0]
    grouped = selection.reshape(tokens, lanes.groups, lanes.width)
    score = jnp.max(grouped, axis=2)
    if top_two and lanes.size > 1:
        member = lax.broadcasted_iota(jnp.int32, grouped.shape, 2)
        best = jnp.min(jnp.where(grouped == score[:, :, None], member, lanes.width), axis=2)
        score = score + jnp.max(jnp.where(member == best[:, :, None], -jnp.inf, grouped), axis=2)
    key = _ordered(score)
    shape = (tokens, lanes.groups, lanes.groups)
    mine, other = lax.broadcasted_iota(jnp.int32, shape, 1), lax.broadcasted_iota(jnp.int32, shape, 2)
    ahead = (key[:, None, :] > key[:, :, None]) | ((key[:, None, :] == key[:, :, None]) & (other < mine))
    kept = jnp.sum(ahead.astype(jnp.int32), axis=2) < groups_kept
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(selection.shape)


def _choose(logits, bias, lanes: _Lanes, *, top_k, scoring, renormalize, scaling, num_groups, groups_kept):
    """The choice for rows of logits, (T, lanes) with -inf where no expert is.

    Returns ids and weights (T, S), S the power of two from K, anything past K; the ids again as a list of (T, 1); and
    which lanes were chosen, (T, lanes).
    """
    if scoring == "softmax":
        exponent = jnp.where(lanes.real, jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True)), 0.0)
        scores = exponent / jnp.sum(exponent, axis=1, keepdims=True)
    else:
        scores = 1.0 / (1.0 + jnp.exp(-logits))
    selection = jnp.where(lanes.real, scores if bias is None else scores + bias, -jnp.inf)
    if num_groups > 1:
        selection = _keep_groups(selection, lanes, groups_kept, top_two=bias is not None)

    # Chosen lanes, and those without an expert, drop below every other.
    key = jnp.where(lanes.real, jnp.maximum(_ordered(selection), LOWEST + 1), LOWEST)
    shape = (logits.shape[0], _power_of_two(top_k))
    slot = lax.broadcasted_iota(jnp.int32, shape, 1)
    ids, weights, each = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32), []
    for k in range(top_k):
        best = jnp.max(key, axis=1, keepdims=True)
        chosen = jnp.min(jnp.where(key == best, lanes.expert, HIGHEST), axis=1, keepdims=True)
        here = (lanes.expert == chosen) & lanes.real
        weight = jnp.sum(jnp.where(here, scores, 0.0), axis=1, keepdims=True)
        ids, weights = jnp.where(slot == k, chosen, ids), jnp.where(slot == k, weight, weights)
        key = jnp.where(here, LOWEST, key)
        each.append(chosen)
    if renormalize:
        weights = weights / (jnp.sum(weights, axis=1, keepdims=True) + 1e-20)
    return ids, weights * scaling, each, (key == LOWEST) & lanes.real


def _load_rows(logits_ref, refs, token, lanes: _Lanes, has_bias: bool):
    tokens = logits_ref.shape[0]
    logits = plt.load(logits_ref.at[token, lanes.expert], mask=lanes.real & (token < tokens), other=-jnp.inf)
    bias = plt.load(refs[0].at[lanes.expert], mask=lanes.real, other=0.0) if has_bias else None
    return logits.astype(jnp.float32), bias


def _choose_kernel(logits_ref, *refs, has_bias, top_k, num_groups, **rule):
    ids_ref, weights_ref = refs[-2:]
    token = pl.program_id(0) + jnp.zeros((1, 1), jnp.int32)
    lanes = _Lanes(logits_ref.shape[1], num_groups)
    logits, bias = _load_rows(logits_ref, refs, token, lanes, has_bias)
    ids, weights, *_ = _choose(logits, bias, lanes, top_k=top_k, num_groups=num_groups, **rule)
    slot = lax.broadcasted_iota(jnp.int32, ids.shape, 1)
    plt.store(ids_ref.at[token, slot], ids, mask=slot < top_k)
    plt.store(weights_ref.at[token, slot], weights, mask=slot < top_k)


def choose_experts(
    logits_tE: jax.Array,
    bias_E: jax.Array | None,
    *,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = False,
    scaling: float = 1.0,
    num_groups: int = 1,
    groups_kept: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Scores, top-k by score plus bias, of the best groups where there are groups, and weights; one warp a token.

    Returns:
      ids (t, K) int32, best first, equal scores to the lower index, and weights (t, K) float32.
    """
    tokens = logits_tE.shape[0]
    operands = [logits_tE] + ([] if bias_E is None else [bias_E.astype(jnp.float32)])
    return pl.pallas_call(
        functools.partial(
            _choose_kernel, top_k=top_k, scoring=scoring, renormalize=renormalize, scaling=scaling,
            num_groups=num_groups, groups_kept=groups_kept, has_bias=bias_E is not None,
        ),
        out_shape=(
            jax.ShapeDtypeStruct((tokens, top_k), jnp.int32),
            jax.ShapeDtypeStruct((tokens, top_k), jnp.float32),
        ),
        grid=(tokens,),
        in_specs=[_WHOLE] * len(operands),
        out_specs=(_WHOLE, _WHOLE),
        compiler_params=plt.CompilerParams(num_warps=1),
        name="moe_choose_experts",
    )(*operands)  # fmt: skip


def _route_kernel(logits_ref, *refs, has_bias, top_k, num_groups, **rule):
    ids_ref, weights_ref, position_ref, schedule_ref = refs[-4:]
    tokens, experts = logits_ref.shape
    token = lax.broadcasted_iota(jnp.int32, (_power_of_two(tokens), 1), 0)
    lanes = _Lanes(experts, num_groups)
    logits, bias = _load_rows(logits_ref, refs, token, lanes, has_bias)
    ids, weights, each, chosen = _choose(logits, bias, lanes, top_k=top_k, num_groups=num_groups, **rule)

    # Experts of a row are distinct, so a column of `chosen` is the rows of an expert in order.
    chosen = (chosen & (token < tokens)).astype(jnp.int32)
    sizes = jnp.sum(chosen, axis=0)
    bits = jnp.sum(chosen << token, axis=0)
    busy = jnp.minimum(sizes, 1)
    start, number, total = jnp.cumsum(sizes) - sizes, jnp.cumsum(busy) - busy, jnp.sum(busy)
    row = start[None, :] + jnp.cumsum(chosen, axis=0) - chosen
    slot = lax.broadcasted_iota(jnp.int32, ids.shape, 1)
    position = jnp.zeros(ids.shape, jnp.int32)
    for k in range(top_k):
        here = (lanes.expert == each[k]) & lanes.real
        position = jnp.where(slot == k, jnp.sum(jnp.where(here, row, 0), axis=1, keepdims=True), position)

    mask = (slot < top_k) & (token < tokens)
    plt.store(ids_ref.at[token, slot], ids, mask=mask)
    plt.store(weights_ref.at[token, slot], weights, mask=mask)
    plt.store(position_ref.at[token, slot], position, mask=mask)
    field = lax.broadcasted_iota(jnp.int32, (sizes.shape[0], FIELDS), 1)
    record = jnp.zeros(field.shape, jnp.int32)
    values = (lanes.expert.reshape(sizes.shape), number, busy, start, sizes, total + jnp.zeros_like(busy), bits)
    for f, value in enumerate(values):
        record = jnp.where(field == f, value[:, None], record)
    plt.store(schedule_ref.at[number[:, None] * FIELDS + field], record, mask=(busy[:, None] > 0) & (field < FIELDS))


def route(
    logits_tE: jax.Array,
    bias_E: jax.Array | None,
    *,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = False,
    scaling: float = 1.0,
    num_groups: int = 1,
    groups_kept: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """All there is to decide for up to 32 tokens whose experts are all here, in one launch of one program.

    Returns:
      ids and weights, as of `choose_experts`; position (t, K), as of `plan_pairs`; and a schedule for products whose
      tile holds all tokens: one record for each expert that was chosen, with its tokens as bits in word 6.
    """
    tokens, experts = logits_tE.shape
    lanes = _power_of_two(num_groups) * _power_of_two(experts // num_groups)
    operands = [logits_tE] + ([] if bias_E is None else [bias_E.astype(jnp.float32)])
    pairs = jax.ShapeDtypeStruct((tokens, top_k), jnp.int32)
    return pl.pallas_call(
        functools.partial(
            _route_kernel, top_k=top_k, scoring=scoring, renormalize=renormalize, scaling=scaling,
            num_groups=num_groups, groups_kept=groups_kept, has_bias=bias_E is not None,
        ),
        out_shape=(
            pairs,
            jax.ShapeDtypeStruct(pairs.shape, jnp.float32),
            pairs,
            jax.ShapeDtypeStruct((min(experts, tokens * top_k) * FIELDS,), jnp.int32),
        ),
        grid=(1,),
        in_specs=[_WHOLE] * len(operands),
        out_specs=(_WHOLE,) * 4,
        compiler_params=plt.CompilerParams(num_warps=max(1, min(8, _power_of_two(tokens) * lanes // 256))),
        name="moe_route",
    )(*operands)  # fmt: skip


def _local(ids_ref, first_ref, pair, experts):
    """Local expert of pairs, `experts` for those that are not here, and past the last pair."""
    (pairs,) = ids_ref.shape
    ids = plt.load(ids_ref.at[pair], mask=pair < pairs, other=0) - first_ref[0]
    return jnp.where((ids >= 0) & (ids < experts) & (pair < pairs), ids, experts)


def _store_rows(position_ref, pair_ref, pair, row, here):
    """Both sides of the map. Rows of pairs that are not here come last: there is no pair in them."""
    there = pair < position_ref.shape[0]
    plt.store(position_ref.at[pair], jnp.where(here, row, -1), mask=there)
    plt.store(pair_ref.at[row], jnp.where(here, pair, -1), mask=there & (row < pair_ref.shape[0]))


def _small_plan_kernel(ids_ref, first_ref, position_ref, sizes_ref, pair_ref, *, experts, block, chunk):
    (pairs,) = ids_ref.shape
    lane = lax.iota(jnp.int32, block)
    pair = pl.program_id(0) * block + lane
    mine = _local(ids_ref, first_ref, pair, experts)
    expert = pl.program_id(0) * block + lane

    def count(c, carry):
        before, size = carry
        other_pair = c * chunk + lax.iota(jnp.int32, chunk)
        other = _local(ids_ref, first_ref, other_pair, experts)
        less = other[None, :] < mine[:, None]
        earlier = (other[None, :] == mine[:, None]) & (other_pair[None, :] < pair[:, None])
        before += jnp.sum((less | earlier).astype(jnp.int32), axis=1)
        size += jnp.sum((other[None, :] == expert[:, None]).astype(jnp.int32), axis=1)
        return before, size

    zero = jnp.zeros((block,), jnp.int32)
    before, size = lax.fori_loop(0, pl.cdiv(pairs, chunk), count, (zero, zero))
    _store_rows(position_ref, pair_ref, pair, before, mine < experts)
    plt.store(sizes_ref.at[expert], size, mask=expert < experts)


def _words(ids_ref, first_ref, experts):
    """Of each word of this program's block: pairs and their local experts, a lane each, and the planes, scalars."""
    lane = lax.iota(jnp.int32, WORD)
    for word in range(BLOCK // WORD):
        pair = pl.program_id(0) * BLOCK + word * WORD + lane
        mine = _local(ids_ref, first_ref, pair, experts)
        yield pair, mine, [jnp.sum(jnp.where(mine & (1 << b), 1 << lane, 0)) for b in range(experts.bit_length())]


def _bits(value, planes):
    """For each plane its bit of every value, all over a word."""
    return [-((value >> b) & 1) for b in range(len(planes))]


def _equal(planes, value):
    """The pairs of a word whose expert is `value`, as bits."""
    equal = jnp.full(value.shape, -1, jnp.int32)
    for plane, own in zip(planes, _bits(value, planes), strict=True):
        equal &= ~(plane ^ own)
    return equal


def _up_to(planes, value):
    """The pairs of a word whose expert is `value` or less, as bits: those where value - expert does not borrow."""
    fits = jnp.full(value.shape, -1, jnp.int32)
    for plane, own in zip(planes, _bits(value, planes), strict=True):
        fits = (own & ~plane) | (fits & (own | ~plane))
    return fits


def _count_kernel(ids_ref, first_ref, up_to_ref, *, experts):
    words = list(_words(ids_ref, first_ref, experts))
    for start in range(0, experts, WORD):
        expert = start + lax.iota(jnp.int32, WORD)
        counts = [lax.population_count(_up_to(planes, expert)) for _, _, planes in words]
        count = functools.reduce(jnp.add, counts)
        plt.store(up_to_ref.at[expert, pl.program_id(0)], count, mask=expert < experts)


def _scan_kernel(up_to_ref, first_row_ref, sizes_ref):
    """For one expert, or the one past the last: its first row in each block, and its rows in all.

    Pairs up to the expert before, summed over blocks, are the rows in front of its own.
    """
    expert = pl.program_id(0)
    experts, blocks = up_to_ref.shape
    block = lax.iota(jnp.int32, _power_of_two(blocks))
    real = block < blocks
    less = plt.load(up_to_ref.at[jnp.maximum(expert - 1, 0), block], mask=real & (expert > 0), other=0)
    up_to = plt.load(up_to_ref.at[jnp.minimum(expert, experts - 1), block], mask=real, other=0)
    up_to = jnp.where(expert < experts, up_to, BLOCK)  # too many in the last block, which is before no other
    count = jnp.where(real, up_to - less, 0)
    plt.store(first_row_ref.at[expert, block], jnp.sum(less) + jnp.cumsum(count) - count, mask=real)

    @pl.when(expert < experts)
    def _():
        sizes_ref[expert] = jnp.sum(count)


def _position_kernel(ids_ref, first_ref, first_row_ref, position_ref, pair_ref, *, experts):
    words = list(_words(ids_ref, first_ref, experts))
    rows = [plt.load(first_row_ref.at[mine, pl.program_id(0)]) for _, mine, _ in words]  # all before the first store
    earlier = (1 << lax.iota(jnp.int32, WORD)) - 1
    for word, (pair, mine, planes) in enumerate(words):
        row = rows[word] + lax.population_count(_equal(planes, mine) & earlier)
        for _, _, others in words[:word]:
            row += lax.population_count(_equal(others, mine))
        _store_rows(position_ref, pair_ref, pair, row, mine < experts)


def plan_pairs(ids_tK: jax.Array, first_expert, *, experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows of pairs in the order (expert, token, slot), the rows of each expert, and the pair of each row.

    Args:
      ids_tK: (t, K) integer expert ids, distinct within a token.
      first_expert: first expert of this rank; may be traced. Pairs outside of [first, first + experts) have no row.
      experts: e.

    Returns:
      position (t, K) int32, -1 for none; group sizes (e,) int32; and pair (R,) int32, R = rows_bound(t, K, e): token *
      K + slot, -1 past the last row.
    """
    (tokens, top_k), pairs = ids_tK.shape, ids_tK.size
    ids = ids_tK.astype(jnp.int32).reshape(pairs)
    first = jnp.asarray(first_expert, jnp.int32).reshape(1)
    position = jax.ShapeDtypeStruct((pairs,), jnp.int32)
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    pair = jax.ShapeDtypeStruct((rows_bound(tokens, top_k, experts),), jnp.int32)
    if pairs <= SMALL:
        block = 8  # little work a program, many programs: what counts here is how long one takes
        position, sizes, pair = pl.pallas_call(
            functools.partial(
                _small_plan_kernel, experts=experts, block=block, chunk=min(512, max(_power_of_two(pairs), 16))
            ),
            out_shape=(position, sizes, pair),
            grid=(pl.cdiv(max(pairs, experts), block),),
            in_specs=[_WHOLE] * 2,
            out_specs=(_WHOLE,) * 3,
            compiler_params=plt.CompilerParams(num_warps=4),
            name="moe_plan_small",
        )(ids, first)
        return position.reshape(ids_tK.shape), sizes, pair
    blocks = pl.cdiv(pairs, BLOCK)
    up_to = pl.pallas_call(
        functools.partial(_count_kernel, experts=experts),
        out_shape=jax.ShapeDtypeStruct((experts, blocks), jnp.int32),
        grid=(blocks,),
        in_specs=[_WHOLE] * 2,
        out_specs=_WHOLE,
        compiler_params=plt.CompilerParams(num_warps=1),
        name="moe_plan_count",
    )(ids, first)
    first_row, sizes = pl.pallas_call(
        _scan_kernel,
        out_shape=(jax.ShapeDtypeStruct((experts + 1, blocks), jnp.int32), sizes),
        grid=(experts + 1,),
        in_specs=[_WHOLE],
        out_specs=(_WHOLE, _WHOLE),
        compiler_params=plt.CompilerParams(num_warps=max(4, min(16, _power_of_two(blocks) // 512))),
        name="moe_plan_scan",
    )(up_to)
    position, pair = pl.pallas_call(
        functools.partial(_position_kernel, experts=experts),
        out_shape=(position, pair),
        grid=(blocks,),
        in_specs=[_WHOLE] * 3,
        out_specs=(_WHOLE, _WHOLE),
        compiler_params=plt.CompilerParams(num_warps=1),
        name="moe_plan_position",
    )(ids, first, first_row)
    return position.reshape(ids_tK.shape), sizes, pair


def _schedule_kernel(sizes_ref, out_ref, *, rows, tile):
    group = pl.program_id(0)
    (experts,) = sizes_ref.shape
    index = lax.iota(jnp.int32, _power_of_two(experts + 1))
    sizes = plt.load(sizes_ref.at[index], mask=index < experts, other=0)
    sizes = jnp.where(index == experts, rows - jnp.sum(sizes), sizes)
    tiles = lax.div(sizes + (tile - 1), jnp.int32(tile))
    pick = lambda values, where: jnp.sum(jnp.where(where, values, 0))  # noqa: E731
    first, start = pick(tiles, index < group), pick(sizes, index < group)
    count, size, total = pick(tiles, index == group), pick(sizes, index == group), jnp.sum(tiles)
    lane = lax.iota(jnp.int32, 128)

    def store(c, carry):
        number = c * 128 + lane
        for field, value in enumerate((group, first, count, start, size, total)):
            value = jnp.broadcast_to(value, (128,))
            plt.store(out_ref.at[(first + number) * FIELDS + field], value, mask=number < count)
        return carry

    lax.fori_loop(0, lax.div(count + 127, jnp.int32(128)), store, None)


def make_schedule(group_sizes_e: jax.Array, *, rows: int, tile: int) -> jax.Array:
    """As schedule.make_schedule, in one launch; records past the last tile are not written."""
    (experts,) = group_sizes_e.shape
    return pl.pallas_call(
        functools.partial(_schedule_kernel, rows=rows, tile=tile),
        out_shape=jax.ShapeDtypeStruct((tile_bound(rows, experts, tile) * FIELDS,), jnp.int32),
        grid=(experts + 1,),
        in_specs=[_WHOLE],
        out_specs=_WHOLE,
        compiler_params=plt.CompilerParams(num_warps=1),
        name="moe_schedule",
    )(group_sizes_e.astype(jnp.int32))
