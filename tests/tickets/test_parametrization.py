import copy
import itertools
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from jacpot import tickets
from jacpot.tickets import Mask, _parametrize, parametrization


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def half_mask(net: nn.Module) -> Mask:
    generator = torch.Generator().manual_seed(1)
    return Mask(
        {k: torch.rand(v.shape, generator=generator) < 0.5 for k, v in Mask.ones(net).items()}
    )


def step(net, optimizer, clip=False):
    optimizer.zero_grad()
    net(torch.randn(10, 6)).square().sum().backward()
    if clip:
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    optimizer.step()


def assert_pruned_are_zero(net, mask):
    for name, kept in mask.items():
        weight = net.get_submodule(name.rpartition(".")[0]).weight
        assert (weight[~kept] == 0).all()
        assert (weight[kept] != 0).all()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_pruned_weight_revives(name, clip):
    net = make_net()
    optimizer = OPTIMIZERS[name](net.parameters())
    for _ in range(3):
        step(net, optimizer, clip)  # momentum that would carry pruned weights on
    mask = half_mask(net)
    tickets.apply(net, mask)
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    before = {name: p.clone() for name, p in net.named_parameters()}
    for _ in range(3):
        step(net, optimizer, clip)
        average.update_parameters(net)
        assert_pruned_are_zero(net, mask)
        assert_pruned_are_zero(average.module, mask)
    assert all(not torch.equal(before[name], p) for name, p in net.named_parameters())
    tickets.bake(net)
    assert_pruned_are_zero(net, mask)


def test_gradients_of_pruned_weights_are_zero():
    net = make_net()
    mask = half_mask(net)
    tickets.apply(net, mask)
    net(torch.randn(4, 6)).sum().backward()
    assert (net[0].parametrizations.weight.original.grad[~mask["0.weight"]] == 0).all()


def test_apply_then_remove_is_the_identity():
    net = make_net()
    before = {name: (p, p.detach().clone()) for name, p in net.named_parameters()}
    everything = Mask.ones(net, include="*")
    tickets.apply(net, ~everything)
    assert (net(torch.randn(2, 6)) == 0).all()
    tickets.remove(net)
    assert [name for name, _ in net.named_parameters()] == list(before)
    for name, parameter in net.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert type(net[0]) is nn.Linear


def test_applied_restores_a_module_whose_masking_is_interrupted(monkeypatch):
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    calls = itertools.count()

    def register(*arguments):
        if next(calls):
            raise KeyboardInterrupt
        return _parametrize.register(*arguments)

    monkeypatch.setattr(parametrization, "register", register)
    with pytest.raises(KeyboardInterrupt), tickets.applied(net, ~Mask.ones(net)):
        raise AssertionError
    assert list(net.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_applied_restores_an_earlier_mask():
    net = make_net()
    outer = half_mask(net)
    tickets.apply(net, outer)
    with tickets.applied(net, ~outer):
        assert tickets.applied_mask(net) == ~outer
    assert tickets.applied_mask(net) == outer


def test_apply_again_replaces_the_mask_in_place():
    net = make_net()
    mask = half_mask(net)
    tickets.apply(net, mask)
    tickets.apply(net, ~mask)
    assert tickets.applied_mask(net) == ~mask
    tickets.remove(net)
    assert type(net[0]) is nn.Linear


def test_bake_gives_plain_keys_and_keeps_identity():
    net = make_net()
    parameters, keys = list(net.parameters()), list(net.state_dict())
    mask = half_mask(net)
    x = torch.randn(3, 6)
    tickets.apply(net, mask)
    with_mask = net(x)
    tickets.bake(net)
    assert list(net.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert torch.equal(net(x), with_mask)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_whole_and_independent(copied):
    net = make_net()
    mask = half_mask(net)
    tickets.apply(net, mask)
    other = copied(net)
    x = torch.randn(3, 6)
    assert torch.equal(net(x), other(x))
    assert tickets.applied_mask(other) == mask
    tickets.remove(other)
    assert tickets.applied_mask(net) == mask
    assert_pruned_are_zero(net, mask)
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in make_net().named_parameters()]


def test_state_dict_round_trip_carries_the_mask():
    net, other = make_net(), make_net()
    mask = half_mask(net)
    tickets.apply(net, mask)
    tickets.apply(other, Mask.ones(other))
    other.load_state_dict(net.state_dict())
    assert tickets.applied_mask(other) == mask


def test_tied_parameters_are_masked_everywhere():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    mask = Mask({"0.weight": torch.eye(4) > 0})
    tickets.apply(net, mask)
    assert torch.equal(net[0].weight, net[1].weight)
    assert (net[1].weight[~mask["0.weight"]] == 0).all()
    other = copy.deepcopy(net)
    assert torch.equal(other[1].weight, net[1].weight)
    tickets.remove(net)
    assert net[0].weight is net[1].weight


def test_recurrent_layers_are_refused_not_ignored():
    layer = nn.LSTM(3, 4)
    mask = ~Mask.ones(layer)
    with pytest.raises(ValueError, match="belongs to a recurrent layer"):
        tickets.apply(layer, mask)
    with pytest.raises(ValueError, match="belongs to a recurrent layer"):
        tickets.supermask(layer)
    with pytest.raises(ValueError, match="belongs to a recurrent layer"):
        tickets.imp(layer, pytest.fail, rewind=3)
    cell = nn.LSTMCell(3, 4, bias=False)
    with tickets.applied(cell, ~Mask.ones(cell)):
        assert (cell(torch.randn(2, 3))[0] == 0).all()


def test_attention_reads_its_masked_weights_also_on_the_fast_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    mask = Mask({n: torch.rand(m.shape) < 0.3 for n, m in Mask.ones(layer).items()})
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        with tickets.applied(layer, mask):
            masked = layer(x)
        tickets.bake(tickets.apply(layer, mask))
        assert torch.equal(layer(x), masked)


def test_pruned_nan_is_zero():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    tickets.apply(layer, {"weight": ~layer.weight.isnan()})
    assert layer.weight[0, 0] == 0


def train_in_parallel(store):
    """Train a pruned network in a process group of this process alone, and check its zeros."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    net = make_net()
    mask = half_mask(net)
    parallel = nn.parallel.DistributedDataParallel(tickets.apply(net, mask))
    step(parallel, torch.optim.Adam(parallel.parameters(), 0.1))
    assert_pruned_are_zero(net, mask)


def test_distributed_data_parallel(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    # A process of its own, which ends without destroying the group: that joins threads with the
    # GIL held, for which one of them may be waiting.
    script = """
import os, sys
from test_parametrization import train_in_parallel
train_in_parallel(sys.argv[1])
os._exit(0)
"""
    environment = {
        "GLOO_SOCKET_IFNAME": "lo",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
    }
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_refusals():
    net = make_net()
    with pytest.raises(ValueError, match=r"got '9\.weight'; it has '0\.weight'"):
        tickets.apply(net, {"9.weight": torch.ones(1) > 0})
    with pytest.raises(ValueError, match=r"shape \(8, 6\) for '0\.weight', got \(1,\)"):
        tickets.apply(net, {"0.weight": torch.ones(1) > 0})
    for other in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        net = make_net()
        other(net[0])
        with pytest.raises(ValueError, match=r"must name parameters.*got '0\.weight'"):
            tickets.apply(net, {"0.weight": torch.ones(8, 6) > 0})
        for way in (tickets.apply, lambda net, mask: tickets.supermask(net, mask=mask)):
            with pytest.raises(ValueError, match="another parametrization"):
                way(net, ~Mask.ones(net))
        assert not tickets.applied_mask(net)
