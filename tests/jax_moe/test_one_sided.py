"""`one_sided` around its kernel: on CPU, where that cannot run, the same blocks are moved by an `all_to_all` of XLA."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import core as mosaic
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jax_moe as jm
from jax_moe import transport
from jax_moe.kernels import choice
from jax_moe.kernels import mosaic_gpu_put as put
from jax_moe.transport import lanes
from tests.jax_moe.kernels.problems import CARDS, card
from tests.jax_moe.layers import SHARED, sharded, tokens

names_peers = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="kernels of this JAX cannot name a peer's array; those of 0.11 can"
)

WIDTH = 6
SIZES = {"dp2": (2,), "dp3": (3,), "dp2.tp2": (2, 2)}


@pytest.fixture
def moved(monkeypatch):
    """The shapes of the arrays that each call of the kernel was to move."""
    calls = []

    def by_all_to_all(arrays, *, axes):
        calls.append([x.shape for x in arrays])
        return tuple(jax.lax.all_to_all(x, axes, 0, 0, tiled=True) for x in arrays)

    monkeypatch.setattr(put, "put_blocks", by_all_to_all)
    return calls


def mesh_of(sizes):
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    return Mesh(devices, ("dp", "tp")[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def spmd(function, mesh):
    """`function` on each rank of the mesh, all arrays split over all of it."""
    spec = P(mesh.axis_names)
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def there_and_back(name, axes, local, **options):
    """Output and gradients of a dispatch, experts that multiply by their number, and a combine."""

    def run(x, ids, weights):
        first = jax.lax.axis_index(axes) * local

        def forward(x, weights):
            mover = getattr(transport, name)
            rows, handle = mover.dispatch(
                x, ids, weights, hops=(axes,), first_expert=first, num_local_experts=local, **options
            )
            expert = jnp.repeat(jnp.arange(local), handle.plan.group_sizes_e, total_repeat_length=len(rows))
            y = mover.combine(rows * (first + expert + 1.0)[:, None], handle)
            return jnp.sum(jnp.sin(y)), (y, handle.dropped[None])

        (_, made), gradients = jax.value_and_grad(forward, (0, 1), has_aux=True)(x, weights)
        return made, gradients

    return run


def routings(ranks, rows, top_k, local):
    experts, rng = ranks * local, np.random.default_rng(ranks)
    spread = np.array([rng.permutation(experts)[:top_k] for _ in range(ranks * rows)])
    uneven = spread.copy()
    for rank in range(ranks):
        uneven[rank * rows : rank * rows + [0, rows, 1, 2][rank % 4]] = experts
    one_rank = np.tile((ranks - 1) * local + np.arange(top_k), (ranks * rows, 1))
    one_token = np.full_like(spread, experts)
    one_token[-1] = spread[-1]
    return {
        "spread": spread,
        "uneven": uneven,
        "one rank": one_rank,
        "one token": one_token,
        "none": np.full_like(spread, experts),
    }


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.5}], ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_it_delivers_what_padded_does_to_the_bit(moved, sizes, options):
    mesh, top_k, local, rows = mesh_of(SIZES[sizes]), 3, 4, 5
    runs = {
        name: jax.jit(spmd(there_and_back(name, mesh.axis_names, local, **options), mesh))
        for name in ("one_sided", "padded")
    }
    rng = np.random.default_rng(0)
    x = rng.standard_normal((mesh.size * rows, WIDTH)).astype(np.float32)
    weights = rng.random((mesh.size * rows, top_k)).astype(np.float32)
    for ids in routings(mesh.size, rows, top_k, local).values():
        given = x, ids.astype(np.int32), weights
        jax.tree.map(np.testing.assert_array_equal, runs["one_sided"](*given), runs["padded"](*given))
    slots = rows if not options else math.ceil(0.5 * rows * top_k / mesh.size)
    there, back = [(mesh.size * slots, 2 * top_k), (mesh.size * slots, WIDTH)], [(mesh.size * slots, WIDTH)]
    # One kernel takes rows and routing there and one takes sums back, and so it is for the gradients.
    assert moved == [there, back, back, there]


def test_a_layer_is_the_layer_over_padded_and_nothing_else_crosses(moved):
    for fields in ({"dp": 2}, {"dp": 2, "tp": 2}, {"dp": 2, "tp": 2, "token_layout": "dp_tp"}):
        out = {}
        for name in ("one_sided", "padded"):
            parallel = jm.ParallelConfig(expert_parallel=True, transport=name, **fields)
            params, mesh = sharded(SHARED, parallel)
            step = jax.jit(functools.partial(jm.moe, config=SHARED, parallel=parallel, mesh=mesh))
            out[name] = step(params, tokens(12, SHARED.hidden_size))
        np.testing.assert_array_equal(out["one_sided"], out["padded"])
    assert len(moved) == 2 * 3


def test_whole_numbers_move_and_have_no_gradient(moved):
    mesh = mesh_of((2,))
    x, whole = np.arange(8.0, dtype=np.float32).reshape(4, 2), np.arange(4, dtype=np.int32)

    def loss(x, whole):
        x, whole = lanes.Puts(("dp",)).there((x, whole))
        return jnp.sum(x * whole[:, None]), whole

    dx, came = jax.jit(spmd(jax.grad(loss, has_aux=True), mesh))(x, whole)
    assert came.tolist() == [0, 2, 1, 3]
    # Row i lies where number came[i] does, and the exchange is its own inverse.
    np.testing.assert_array_equal(dx, np.repeat([[0.0], [1.0], [2.0], [3.0]], 2, 1))


def test_without_ranks_or_rows_nothing_moves(moved):
    tree = {"a": jnp.ones((3, 2)), "b": jnp.zeros((0, 4))}
    jax.tree.map(np.testing.assert_array_equal, lanes.Puts(()).there(tree), tree)
    shapes = [jax.ShapeDtypeStruct((rows, 1), jnp.float32) for rows in (4, 0)]
    came = jax.eval_shape(spmd(lambda a, b: lanes.Puts(("dp",)).back((a, b)), mesh_of((2,))), *shapes)
    assert [x.shape for x in came] == [(4, 1), (0, 1)]
    assert moved == [[(2, 1)]]


def test_under_vmap_a_batch_is_wider_rows(moved):
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 3, 2), (8, 2)))
    mesh = mesh_of((2,))

    def exchange(lane):
        return jax.jit(spmd(jax.vmap(lambda x, y: lane.there((x, y)), (1, None), 1), mesh))

    jax.tree.map(
        np.testing.assert_array_equal, exchange(lanes.Puts(("dp",)))(x, y), exchange(lanes.Slots(("dp",)))(x, y)
    )
    assert moved[-1] == [(4, 3, 2), (4, 3, 2)]


def test_under_vmap_an_empty_batch_moves_nothing(moved):
    there = jax.jit(spmd(jax.vmap(lambda x: lanes.Puts(("dp",)).there((x,))[0], 1, 1), mesh_of((2,))))
    assert there(np.zeros((8, 0, 2), np.float32)).shape == (8, 0, 2)
    assert all(0 not in shape for call in moved for shape in call)


def test_a_batch_of_gradients_of_what_is_not_batched(moved):
    x, g = np.arange(12.0, dtype=np.float32).reshape(4, 3), np.arange(24.0, dtype=np.float32).reshape(4, 2, 3)

    def gradients(lane):
        def loss(x, g):
            return jnp.sum(lane.there((x, g))[0] ** 2 * lane.back((g, x[:, 0]))[0])

        def batched(x, g):
            return jnp.sum(jax.vmap(loss, (None, 1))(x, g))

        each = jax.vmap(jax.grad(loss), (None, 1), 1)
        return jax.jit(spmd(lambda x, g: (each(x, g), jax.grad(batched)(x, g)), mesh_of((2,))))(x, g)

    jax.tree.map(np.testing.assert_array_equal, gradients(lanes.Puts(("dp",))), gradients(lanes.Slots(("dp",))))


@pytest.mark.parametrize("stride", [128, 384])
def test_the_threads_take_every_piece_once(stride):
    for units in (1, 127, 128, 129, 511, 512, 1024, 1025, 128 * 8 + 1, 128 * 17 - 1, 384 * 24 + 5):
        taken = np.zeros(units, int)
        for start, stop, number in put._rounds(units, stride):
            for thread in range(stride):
                for first in range(start + thread, stop, stride * number):
                    taken[first : first + number * stride : stride] += 1
        assert (taken == 1).all(), units


@pytest.mark.parametrize(("size", "units"), [(4096, (256, 16)), (24, (3, 8)), (12, (3, 4)), (30, (15, 2)), (7, (7, 1))])
def test_pieces_are_as_wide_as_divides_a_block(size, units):
    assert put._units(size) == units


def cuda(function, mesh, *operands, kind="H100"):
    """The program of `function` over abstract devices of that kind."""
    with card(CARDS[kind], mesh):
        run = spmd(function, jax.sharding.get_abstract_mesh())
        return jax.jit(run).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@names_peers
def test_for_a_gpu_dispatch_is_one_kernel_and_combine_another_and_there_is_no_collective(monkeypatch):
    monkeypatch.setattr(choice, "capability", lambda: "9.0")
    mesh = mesh_of((2, 2))
    shapes = ((20, 40), jnp.bfloat16), ((20, 3), jnp.int32), ((20, 3), jnp.float32)
    text = cuda(
        there_and_back("one_sided", mesh.axis_names, 4), mesh, *(jax.ShapeDtypeStruct(*each) for each in shapes)
    )
    assert text.count("uses_xla_collective_metadata = true") == 4
    for word in ("all_to_all", "all_gather", "all_reduce", "reduce_scatter", "collective_permute"):
        assert word not in text


@names_peers
@pytest.mark.parametrize("sizes", SIZES)
def test_a_kernel_stores_then_signals_each_peer_and_then_waits_for_all(monkeypatch, sizes):
    monkeypatch.setattr(choice, "capability", lambda: "9.0")
    modules, serialize = [], mosaic._run_serde_pass

    def seen(module, **options):
        modules.append(str(module))
        return serialize(module, **options)

    monkeypatch.setattr(mosaic, "_run_serde_pass", seen)
    mesh = mesh_of(SIZES[sizes])
    both = (
        jax.ShapeDtypeStruct((mesh.size**2 * 64, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((mesh.size**2, 6), jnp.int32),
    )
    cuda(lambda *arrays: put.put_blocks(arrays, axes=mesh.axis_names), mesh, *both)
    (text,) = modules
    words = "llvm.store|bar.sync|red.release.sys.global.add|atom.relaxed.sys.global.cas|fence.acquire.sys|multimem"
    kinds = [kind for kind, _ in itertools.groupby(re.findall(words, text[text.index("gpu.launch") :]))]
    # A peer is signalled once all threads have stored what is for it; this rank's own block comes after all signals.
    told = ["llvm.store", "bar.sync", "red.release.sys.global.add"] * (mesh.size - 1)
    assert kinds == [*told, "llvm.store", "atom.relaxed.sys.global.cas", "fence.acquire.sys", "bar.sync"]
    # For two arrays and a semaphore of each peer the addresses there and here are looked up, and this rank's number.
    looked_up = len(re.findall(r"memref.load %\S+ : memref<\d+xi64", text))
    assert looked_up == 9 * (mesh.size - 1) + len(mesh.axis_names)
    assert f"%c{mesh.size - 1}_i32" in text.split("scf.while")[1].split(")")[0]


@names_peers
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(2, 1), (6, 5), (64, 7168)])
def test_blocks_of_any_length_lower(monkeypatch, shape, dtype):
    monkeypatch.setattr(choice, "capability", lambda: "9.0")
    put_one = functools.partial(put.put_blocks, axes=("dp",))
    text = cuda(lambda x: put_one((x,))[0], mesh_of((2,)), jax.ShapeDtypeStruct((2 * shape[0], shape[1]), dtype))
    assert text.count("@mosaic_gpu_v2") == 1


def test_an_exchange_over_other_axes_than_the_mesh_s_or_in_another_order_is_refused():
    mesh = mesh_of((2, 2))
    names = mesh.axis_names

    def lowered(axes):
        return cuda(
            lambda x: put.put_blocks((x,), axes=axes)[0], mesh, jax.ShapeDtypeStruct((4 * 4 * 8, 4), jnp.float32)
        )

    for axes in (names[::-1], names[:1]):
        with pytest.raises(
            NotImplementedError, match=f"over {{'{axes[0]}': 2.*: expected the same ones in the same order"
        ):
            lowered(axes)


def test_more_ranks_than_xla_has_addresses_for_are_refused(monkeypatch):
    monkeypatch.setattr(put, "MOST_RANKS", 3)
    with pytest.raises(NotImplementedError, match="4 ranks: expected at most 3"):
        cuda(lambda x: put.put_blocks((x,), axes=("dp",))[0], mesh_of((4,)), jax.ShapeDtypeStruct((32, 4), jnp.float32))


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="kernels of this JAX can name a peer's array")
def test_an_older_jax_is_refused(monkeypatch):
    with pytest.raises(NotImplementedError, match=r"JAX 0\.10\.\d+: expected 0.11 or newer"):
        cuda(lambda x: put.put_blocks((x,), axes=("dp",))[0], mesh_of((2,)), jax.ShapeDtypeStruct((8, 4), jnp.float32))


@names_peers
def test_what_it_cannot_do_it_says(monkeypatch):
    x, mesh = jax.ShapeDtypeStruct((8, 4), jnp.float32), mesh_of((2, 2))

    def run(axes=("dp", "tp"), mesh=mesh, **options):
        return cuda(lambda x: put.put_blocks((x,), axes=axes)[0], mesh, x, **options)

    with pytest.raises(NotImplementedError, match=r"'one_sided' cannot run here: .* these ranks are on CPU"):
        jax.jit(spmd(lambda x: put.put_blocks((x,), axes=("dp", "tp"))[0], mesh))(np.zeros((8, 4)))
    with pytest.raises(NotImplementedError, match=r"axes \{'dp': 2, 'tp': 2\} and the exchange is over \{'dp': 2\}"):
        run(axes=("dp",))
    monkeypatch.setattr(choice, "capability", lambda: "8.0")
    with pytest.raises(NotImplementedError, match=r"compute capability 8\.0"):
        run()
    monkeypatch.setattr(choice, "capability", lambda: "9.0")
    monkeypatch.setattr(put, "no_peer_access", lambda: "GPU 0 cannot address the memory of GPU 1")
    with pytest.raises(NotImplementedError, match="GPU 0 cannot address"):
        run()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(NotImplementedError, match="2 processes: expected one over all GPUs"):
        run()


@names_peers
def test_typed_varying_axes_are_refused(monkeypatch):
    monkeypatch.setattr(choice, "capability", lambda: "9.0")
    mesh = mesh_of((2,))
    with card(CARDS["H100"], mesh):
        here = jax.sharding.get_abstract_mesh()
        run = jax.shard_map(lanes.Puts(("dp",)).there, mesh=here, in_specs=P("dp"), out_specs=P("dp"))
        with pytest.raises(NotImplementedError, match="check_vma=True"):
            jax.eval_shape(run, jax.ShapeDtypeStruct((8, 4), jnp.float32))
