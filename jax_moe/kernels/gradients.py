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
    """
    return jax.custom_batching.sequential_vmap(lambda *args: kernel(*args))
