"""A kernel forward, the reference's gradient backward; under vmap, one call of the kernel after the other."""

from collections.abc import Callable
from typing import Any

import jax


def with_gradient_of(reference: Callable, kernel: Callable) -> Callable:
    """`kernel`, differentiated as `reference`, which takes the same arguments and computes the same function.

    The reference runs once more in the backward pass, so nothing but the arguments is kept. Arguments that are not
    floating point have no gradient. See `one_by_one` for what `jax.vmap` makes of it.
    """
    kernel = one_by_one(kernel)
    run = jax.custom_vjp(lambda *args: kernel(*args))

    def forward(*args: Any):
        return kernel(*args), args

    def backward(args: tuple, cotangents: Any):
        return jax.vjp(reference, *args)[1](cotangents)

    run.defvjp(forward, backward)
    return run


def one_by_one(kernel: Callable) -> Callable:
    """`kernel`, which `jax.vmap` calls in a loop, once for each element of the batch.

    A kernel's grid, work list and memory are laid out for one problem; and each call fills the card.
    `jax.custom_batching.sequential_vmap` is the same, but fails where nothing that a derivative is taken of is batched:
    JAX then asks the rule about no argument, and comes back with those that are. What derivatives are taken of wants a
    rule of its own around this (`with_gradient_of`): JAX has none for a loop of kernels.
    """
    run = jax.custom_batching.custom_vmap(lambda *args: kernel(*args))

    @run.def_vmap
    def rule(axis_size: int, batched: Any, *args: Any):
        leaves, structure = jax.tree.flatten(args)
        many = jax.tree.leaves(tuple(batched))
        if not any(many):
            out = run(*args)
            return out, jax.tree.map(lambda _: False, out)

        def one(own: list):
            own_leaves = iter(own)
            merged = [next(own_leaves) if b else leaf for leaf, b in zip(leaves, many, strict=True)]
            return run(*jax.tree.unflatten(structure, merged))

        out = jax.lax.map(one, [leaf for leaf, b in zip(leaves, many, strict=True) if b])
        return out, jax.tree.map(lambda _: True, out)

    return run
