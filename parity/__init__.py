"""Runs jax_moe and torch_moe on the same cases and judges whether they compute the same thing."""
