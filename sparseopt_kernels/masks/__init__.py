"""Masks: where they are registered, which weights can have one, and what can be asked about them.

Nothing here changes a mask, or knows of optimizers, kernels or topologies.
"""
