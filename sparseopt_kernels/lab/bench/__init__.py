"""``sparseopt bench``: times optimizers on a network. The demo and ``benchmarks/`` use its parts."""
