"""Conversions of a model before or after training: load dense weights, apply or remove masks, convert to CSR.

No optimizer step is made here.
"""
