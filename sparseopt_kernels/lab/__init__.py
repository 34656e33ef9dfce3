"""The commands of ``sparseopt``: training, the experiments of the paper, the demo, the benchmark, the doctor.

The rest of the package never imports this room, but for ``__main__``, which is the command itself.
"""
