"""Masks: the mapping from parameter to mask, its registration in a model, and the weights that can have one.

Nothing here changes a mask, or knows of optimizers, kernels or topologies.
"""
