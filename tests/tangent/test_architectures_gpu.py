"""Networks of every kind on a GPU: the Jacobian and kernel that they have on the CPU."""

import architectures
import pytest
import torch
import zoo
from test_rules import COVERED, UNCOVERED

import jacpot

# What the pretended GPU cannot do: it has no kernels for bags, moves a tied weight twice, and loses
# the numbers of a list that is an index.
NOT_PRETENDED = {
    "gradient_by_torch_func",
    "bag, mean",
    "bag, sum",
    "bag, weighted",
    "bag, max",
    "gpt",
    "nano_gpt",
    "tied",
    "attention with its own tokens",
}
# cuDNN has no derivatives of packed sequences in evaluation mode.
NETWORKS = [
    *architectures.ARCHITECTURES,
    *zoo.NETWORKS,
    *COVERED,
    *(name for name in UNCOVERED if name != "packed"),
]


def build(name):
    if name in architectures.ARCHITECTURES:
        return architectures.build(name)
    if name in zoo.NETWORKS:
        return zoo.build(name)
    torch.manual_seed(4)
    net, x = (COVERED | UNCOVERED)[name]()
    return net.double(), x


@pytest.mark.filterwarnings("ignore:.*has no layer rule", "ignore:.*jit")
@pytest.mark.parametrize("name", NETWORKS)
def test_jacobian(name, gpu, request):
    if name in NOT_PRETENDED and "pretended" in request.node.callspec.id:
        pytest.skip("the pretended GPU has not all that this network takes")
    net, x = build(name)
    here = jacpot.jacobian(net, x)
    moved = tuple(part.to(gpu) for part in x) if isinstance(x, tuple) else x.to(gpu)
    there = jacpot.jacobian(net.to(gpu), moved)
    for got, expected in ((there.dense(), here.dense()), (there.gram(), here.gram())):
        assert got.device.type == "cuda"
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-8, atol=1e-8)
