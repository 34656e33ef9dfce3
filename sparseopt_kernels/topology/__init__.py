"""The choice of active weights: densities of layers, first masks, and the methods that change masks.

Here may be whatever decides which weights are active. It knows masks, weights and gradients, and never the
optimizer, its plans or its backends. Methods are subclasses of ``DynamicSparseTraining``.
"""
