"""``sparseopt reproduce``: the experiments of the paper, their results and pictures.

Training itself is in ``training``.
"""
