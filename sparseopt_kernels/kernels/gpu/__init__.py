"""The GPU backends: what they launch (``plan``, ``tables``, ``lists``), and their kernels in Triton and CUDA.

Nothing here knows the optimizer, and nothing waits for the device.
"""
