"""What changes weights, and what that needs, on top of `infer` and `pangu_jax`."""
