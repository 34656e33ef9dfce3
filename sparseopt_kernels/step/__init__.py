"""A step of ``SparseOpt``, from parameter groups to the call of a backend: what has changed, plans, numbers.

There is no arithmetic of the update rule here, and nothing that chooses masks.
"""
