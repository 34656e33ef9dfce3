"""``sparseopt bench``: times optimizers on a network. The demo and ``benchmarks/`` use its parts.

Here may be contestants and what times them. Nothing here trains, or knows an experiment.
"""
