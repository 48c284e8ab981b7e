"""Quantised weights, activations and caches.

    scheme.py    which matrices are held in which numbers: data only
    rows.py      rounding of rows of numbers: weights per output channel, activations per token
    weight.py    the quantised leaf, which stands where a float matrix stood
    product.py   products with it, real integer ones where both sides are integers
    leaves.py    the leaf in a model's tree: shapes, places, parts

`linear.linear` takes either kind of weight: the text of the model does not notice.
"""
