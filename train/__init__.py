"""Loops that change weights, on top of `infer` and `pangu_jax`.

Nothing is here yet but the door.
"""
