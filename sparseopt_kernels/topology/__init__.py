"""Which weights are active: densities of layers, the masks to start with, their change during training."""
