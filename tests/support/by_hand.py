"""Masks and parameters written out in a test."""

import torch
from torch import nn


def bits(text):
    return torch.tensor([character == "1" for character in text.replace(" ", "")])


def parameter_with(values, gradient=None, dtype=torch.float32):
    parameter = nn.Parameter(torch.tensor(values, dtype=dtype))
    if gradient is not None:
        parameter.grad = torch.tensor(gradient, dtype=dtype)
    return parameter
