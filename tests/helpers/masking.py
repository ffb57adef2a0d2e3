"""Networks whose pruned weights are zeros, against which masked and sparse ones are held."""

import copy

import torch


def masked_copy(layer, mask):
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        dense.weight.mul_(mask)
    return dense
