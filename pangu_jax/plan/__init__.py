"""Planning: what a model and a layout need of a machine that is not here.

`target` says what a machine has, `cost` what the model needs by formula, `program` and `hlo` what
the machine's own compiler makes of it. Nothing here has run on the machine: its numbers are
planned, not measured.
"""
