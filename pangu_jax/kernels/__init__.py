"""Kernels behind one seam: an operation is a folder with one public function of the same name.

    matmul       rows times a matrix, float or int8
    experts      routed experts applied to the tokens that chose them
    attention    queries against keys and values in a cache

Each has plain XLA (`reference` or `xla`), which runs everywhere and is what the others are tested
against, and kernels for platforms where XLA is slow. `implementation=None` takes the best one for
the platform that the program is compiled for, whichever that is (`jax.lax.platform_dependent`); a
name forces one, for tests and measurements. One that cannot take its arguments is passed over, or
raises NotImplementedError when it was asked for by name.
"""
