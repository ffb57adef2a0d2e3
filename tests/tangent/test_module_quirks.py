"""Modules that do something unusual: numbers as parameters, their own forward, torch.no_grad."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import by_autograd, dense
from torch import nn
from torch.utils.checkpoint import checkpoint

import jacpot


class Scaled(nn.Module):
    """As CLIP has it: a parameter that is a number."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.scale * self.layer(x)


def test_a_parameter_may_be_a_number():
    net, x = Scaled().double(), torch.randn(5, 4).double()
    J = jacpot.jacobian(net, x)
    torch.testing.assert_close(J.dense(), dense(net, x))
    assert J.unflatten(J.T @ J.outputs)["scale"].shape == ()
    assert J.gram(outputs="trace").shape == (5, 5)


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return 2 * x @ self.weight.T


@jacpot.register_layer_rule(Doubled)
def doubled(signals, layer, x):
    from jacpot.tangent.rules import Outer

    return {"weight": Outer(2 * x[:, None, None], signals[:, :, None, None])}


@pytest.mark.filterwarnings("ignore:Doubled")
def test_a_forward_of_the_instance_is_what_counts_and_stays():
    net, x = Doubled().double(), torch.randn(5, 4).double()
    factored = jacpot.jacobian(net, x)
    forward = net.forward = lambda x: x @ net.weight.T
    J = jacpot.jacobian(net, x)
    torch.testing.assert_close(2 * J.dense(), factored.dense())
    assert vars(net)["forward"] is forward


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.second, self.first(x).tanh(), use_reentrant=self.use_reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_are_refused(use_reentrant):
    with pytest.raises(RuntimeError, match=r"something in it.* uses .* switch that off"):
        jacpot.jacobian(Checkpointed(use_reentrant), torch.randn(3, 4))


class Frozen(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.backbone, self.head, self.mode = nn.Linear(4, 6), nn.Linear(6, 2), mode

    def forward(self, x):
        with self.mode():
            features = self.backbone(x).relu()
        return self.head(features.clone())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_part_without_gradients_has_zero_columns(mode):
    net, x = Frozen(mode), torch.randn(5, 4)
    J = jacpot.jacobian(net, x)
    columns = J.unflatten(J.T @ torch.ones(5, 2))
    assert not columns["backbone.weight"].any()
    assert not columns["backbone.bias"].any()
    torch.testing.assert_close(columns["head.weight"][0], net.backbone(x).relu().sum(0))


class Addmm(nn.Module):
    def __init__(self, bias, **factors):
        super().__init__()
        self.weight, self.factors = nn.Parameter(torch.randn(4, 3)), factors
        self.bias = nn.Parameter(torch.randn(*bias))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight, **self.factors)


@pytest.mark.filterwarnings("ignore:Addmm")
@pytest.mark.parametrize("factors", [{}, {"alpha": 2.0}, {"beta": 0.5, "alpha": 3.0}])
@pytest.mark.parametrize("bias", [(3,), (1,), (1, 3)])
def test_addmm_with_factors_and_any_bias(bias, factors):
    net, x = Addmm(bias, **factors).double(), torch.randn(5, 4).double()
    torch.testing.assert_close(jacpot.jacobian(net, x).dense(), dense(net, x))


def test_threads_take_turns():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    parts = torch.randn(24, 7, 4).double().unbind()
    masks = [{"0.weight": torch.rand(16, 4) < 0.5} for _ in parts]

    def kernel(x, mask):
        return jacpot.jacobian(net, x, mask=mask).gram()

    expected = [kernel(x, mask) for x, mask in zip(parts, masks, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(kernel, parts, masks))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


class Routed(nn.Module):
    """Each example goes to two experts of its own choice, which may be the same one twice."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))
        self.turned = nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        rows = []
        for row in x:
            chosen = [int(row[0] > 0), 2 * int(row[1] > 0)]
            y = sum(self.experts[c](row[None]) for c in chosen).tanh()
            rows.append((y @ self.turned if row[2] > 0 else y[:, :2])[0])
        return torch.stack(rows)


def test_each_example_may_take_its_own_way():
    torch.manual_seed(0)
    net, x = Routed().double(), torch.randn(16, 4).double()
    mask = {"experts.0.weight": torch.rand(3, 4) < 0.5, "experts.1.bias": torch.rand(3) < 0.5}
    for given in ({}, mask):
        J = jacpot.jacobian(net, x, mask=given)
        masked = copy.deepcopy(net)
        with torch.no_grad():
            for name, kept in given.items():
                masked.get_parameter(name).mul_(kept)
        kept = [given.get(n, torch.ones(p.shape).bool()) for n, p in net.named_parameters()]
        kept = torch.cat([mask.flatten() for mask in kept])
        expected = torch.cat([by_autograd(masked, row[None]) for row in x])[:, :, kept]
        torch.testing.assert_close(J.dense(), expected)
        torch.testing.assert_close(J.gram(), torch.einsum("nkp,mlp->nkml", expected, expected))


class Nothing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)[:, :0]


@pytest.mark.parametrize("n", [0, 1, 5])
def test_a_network_without_outputs_has_an_empty_jacobian(n):
    net, x = Nothing(), torch.randn(n, 4)
    mask = {"layer.weight": torch.rand(3, 4) < 0.5}
    for given in (None, mask):
        J = jacpot.jacobian(net, x, mask=given)
        p = J.n_parameters
        assert J.dense().shape == (n, 0, p)
        assert (J @ torch.ones(p)).shape == (n, 0)
        assert torch.equal(J.T @ torch.ones(n, 0), torch.zeros(p))
        assert torch.equal(J.gram(outputs="trace"), torch.zeros(n, n))
        assert jacpot.ntk(net, x, mask=given, batch_size=2).shape == (n, 0, n, 0)
        assert jacpot.ntk(net, x, mask=given, outputs="diagonal").shape == (n, n, 0)
        lin = jacpot.linearize(net, given)
        for loss in ("mse", "huber"):
            assert lin.fit(x, torch.ones(n, 0), loss, ridge=0.1).converged
        assert not any(value.any() for value in lin.delta.values())
        assert lin(x).shape == (n, 0)
    assert jacpot.gauss_newton(net, x, torch.ones(n, 0)).steps == 0
    with pytest.raises(ValueError, match="'ridge' must be a number where there are no"):
        lin.fit(x, torch.ones(n, 0), ridge="loo")


def test_a_network_without_values_is_refused():
    with pytest.raises(ValueError, match=r"Linear \(at '0'\) are on the meta device"):
        jacpot.jacobian(nn.Sequential(nn.Linear(4, 3)).to("meta"), torch.randn(5, 4))
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    net[1].running_mean = torch.zeros(3, device="meta")
    with pytest.raises(ValueError, match=r"BatchNorm1d \(at '1'\) are on the meta device"):
        jacpot.ntk(net, torch.randn(5, 4))


class Unmoved(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return x


def test_training_what_the_outputs_do_not_depend_on_ends_at_once():
    net, x = Unmoved(), torch.randn(5, 4)
    result = jacpot.gauss_newton(net, x, torch.zeros(5, 4))
    assert result.steps == 0
    assert result.gradient_norm == 0
