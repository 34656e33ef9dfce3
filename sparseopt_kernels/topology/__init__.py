"""Which weights are active: densities of layers, and their change during training (SET, RigL).

Imports nothing: ``masks.py`` needs ``topology.densities``, and ``topology.dynamic`` needs ``masks.py``.
"""
