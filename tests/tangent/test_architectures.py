"""Networks as people write them, against torch.autograd, one example and output at a time."""

import pytest
import torch
from architectures import ARCHITECTURES, build
from oracle import by_autograd, check_operations, relative_error

import jacpot
from jacpot.tangent.network import Network, recording
from jacpot.tangent.probe import probe

# Those whose functions are no proof, because one is unknown or looks at values.
NOT_PROVEN = {
    "experts_by_choice",
    "prototypes",
    "fourier_operator",
    "hamiltonian",
    "gradient_by_torch_func",
    "function_of_its_own",
    "traced_inside",
}


@pytest.mark.filterwarnings("ignore:.*has no layer rule", "ignore:.*jit")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_jacobian(name):
    net, x = build(name)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    attributes = {key: set(vars(module)) for key, module in net.named_modules()}
    wanted = [p.requires_grad for p in net.parameters()]
    frozen = torch.cat([torch.full((p.numel(),), not p.requires_grad) for p in net.parameters()])
    expected = by_autograd(net.requires_grad_(), x)[:, :, ~frozen]
    for p, was in zip(net.parameters(), wanted, strict=True):
        p.requires_grad_(was)

    J = jacpot.jacobian(net, x)
    one = jacpot.jacobian(net, tuple(e[:1] for e in x) if isinstance(x, tuple) else x[:1])
    check_operations(J, expected, one, expected[:1])
    check_operations(one, expected[:1], J, expected)

    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert attributes == {key: set(vars(module)) for key, module in net.named_modules()}
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.filterwarnings("ignore:.*jit")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_is_proven_to_take_examples_one_by_one(name):
    net, x = build(name)
    with recording():
        course = probe(Network(net), x).course
    assert (course is None) == (name in NOT_PROVEN)


@pytest.mark.filterwarnings("ignore:.*has no layer rule", "ignore:.*jit")
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"prototypes"}))
def test_linearized(name):  # torch.cdist has neither a forward mode nor second derivatives
    net, x = build(name)
    J, lin = jacpot.jacobian(net, x), jacpot.linearize(net)
    lin.set_delta({key: torch.randn_like(value) for key, value in lin.delta.items()})
    outputs = lin(x).reshape(J.outputs.shape)
    assert relative_error(outputs.detach(), J.outputs + J @ lin.delta) < 1e-10
    u = torch.randn_like(outputs)
    (outputs * u).sum().backward()
    gradient = {key: lin.deltas[key.replace(".", "/")].grad for key in lin.delta}
    assert relative_error(J.flatten(gradient), J.T @ u) < 1e-10
    with torch.inference_mode():
        assert relative_error(lin(x).reshape(outputs.shape), outputs.clone()) < 1e-10
