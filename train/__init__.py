"""What makes new weights and vocabularies, on top of `infer` and `pangu_jax`.

So far that is `pangu-train tokenizer`; no loop changes weights yet.
"""
