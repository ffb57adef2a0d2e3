"""The swap of a whole network: what it computes, trains, shares and refuses."""

import copy

import pytest
import torch
from masking import masked_copy
from torch import nn

from jacpot.nn import MaskedConv2d, MaskedLinear, SparseConv2d, SparseLinear, sparsify


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 3 * 3, 20),
        nn.ReLU(),
        nn.Linear(20, 10),
    )


def masks_of(module, density=0.15):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(p.shape, generator=generator) < density
        for name, p in module.named_parameters()
        if p.dim() > 1
    }


def apply_masks(module, masks):
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).mul_(mask)


def test_sparsify_keeps_outputs_and_trains_as_the_masked_network():
    dense = network()
    masks = masks_of(dense)
    untouched = copy.deepcopy(dense.state_dict())
    sparse = sparsify(dense, masks)
    assert all(torch.equal(v, untouched[k]) for k, v in dense.state_dict().items())
    apply_masks(dense, masks)
    x, target = torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (dense, sparse)]
    for _ in range(5):
        for module, optimizer in zip((dense, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), target).backward()
            if module is dense:
                for name, mask in masks.items():
                    module.get_parameter(name).grad.mul_(mask)
            optimizer.step()
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-3, atol=1e-4)
    moments = optimizers[1].state[sparse[5].values]["exp_avg"]
    assert moments.shape == (int(masks["5.weight"].sum()),)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own
@pytest.mark.parametrize("density", [0.15, 0.95])  # of which the second takes dense products
def test_linearization_is_that_of_the_masked_network(density):
    dense = network().double()
    masks = masks_of(dense, density)
    sparse = sparsify(dense, masks)
    apply_masks(dense, masks)
    x = torch.randn(20, 3, 8, 8, dtype=torch.float64)
    step = {name: torch.randn_like(p) for name, p in dense.named_parameters()}
    kept = {
        (name[:-6] + "values" if name in masks else name): (
            value[masks[name]] if name in masks else value
        )
        for name, value in step.items()
    }

    def tangent(module, step):
        start = {name: p.detach() for name, p in module.named_parameters()}
        return torch.func.jvp(
            lambda p: torch.func.functional_call(module, p, (x,)), (start,), (step,)
        )[1]

    masked = {name: value * masks.get(name, 1) for name, value in step.items()}
    torch.testing.assert_close(tangent(sparse, kept), tangent(dense, masked))


def test_sparsify_takes_the_masks_of_masked_layers_and_leaves_the_rest():
    dense = network()
    masks = masks_of(dense)
    dense[5] = MaskedLinear.from_linear(dense[5], masks["5.weight"])
    dense[0] = MaskedConv2d.from_conv2d(dense[0], masks["0.weight"])
    x = torch.randn(4, 3, 8, 8)
    sparse = sparsify(dense)
    assert [type(sparse[i]) for i in (0, 2, 5, 7)] == [
        SparseConv2d,
        nn.Conv2d,
        SparseLinear,
        nn.Linear,
    ]
    torch.testing.assert_close(sparse(x), dense(x))
    only = sparsify(nn.Linear(3, 2), {"weight": torch.ones(2, 3, dtype=torch.bool)})
    assert isinstance(only, SparseLinear)


def test_sparsify_swaps_a_shared_layer_everywhere():
    layer = nn.Linear(4, 4)
    both = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    sparse = sparsify(both, {"a.weight": torch.rand(4, 4) < 0.5})
    assert sparse["a"] is sparse["b"][0]
    assert isinstance(sparse["a"], SparseLinear)


def test_sparsify_keeps_what_is_shared():
    layer = nn.Linear(8, 8)
    twice = nn.Sequential(layer, nn.ReLU(), layer)
    mask = torch.rand(8, 8) < 0.4
    x = torch.randn(5, 8)
    sparse = sparsify(twice, {"0.weight": mask})
    assert sparse[0] is sparse[2]
    masked = nn.Sequential(masked_copy(layer, mask), nn.ReLU(), masked_copy(layer, mask))
    torch.testing.assert_close(sparse(x), masked(x))

    tied = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    tied[2].weight, tied[2].bias = tied[0].weight, tied[0].bias
    for names in (["0.weight"], ["2.weight"], ["0.weight", "2.weight"]):
        sparse = sparsify(tied, dict.fromkeys(names, mask))
        assert sparse[0].values is sparse[2].values
        assert sparse[0].bias is sparse[2].bias
        masked = nn.Sequential(
            *(masked_copy(tied[i], mask) if i != 1 else tied[1] for i in (0, 1, 2))
        )
        torch.testing.assert_close(sparse(x), masked(x))
    with pytest.raises(ValueError, match=r"one mask for '2\.weight' and '0\.weight'"):
        sparsify(tied, {"0.weight": mask, "2.weight": ~mask})
    head = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
    head[1].weight = head[0].weight
    with pytest.raises(ValueError, match="of Embedding, cannot be made sparse"):
        sparsify(head, {"1.weight": mask})


def test_sparsify_keeps_hooks():
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].register_forward_hook(lambda layer, args, y: y + 1)
    net[0].register_forward_pre_hook(
        lambda layer, args, kwargs: ((args[0] * 2,), {}), with_kwargs=True
    )
    full = torch.ones(4, 4, dtype=torch.bool)
    x = torch.randn(3, 4)
    torch.testing.assert_close(sparsify(net, {"0.weight": full})(x), net(x))


def test_sparsify_refuses_what_it_cannot_swap():
    with pytest.raises(ValueError, match="must name parameters of the module, got 'none'"):
        sparsify(nn.Linear(2, 2), {"none": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"shape \(2, 2\) for 'weight', got \(2, 3\)"):
        sparsify(nn.Linear(2, 2), {"weight": torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="'bias', of Linear, cannot be made sparse"):
        sparsify(nn.Linear(2, 2), {"bias": torch.ones(2, dtype=torch.bool)})
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(ValueError, match=r"out_proj.weight.* cannot be made sparse"):
        sparsify(attention, {"out_proj.weight": torch.ones(4, 4, dtype=torch.bool)})
    with pytest.raises(TypeError, match="'mask' must be a mapping"):
        sparsify(nn.Linear(2, 2), [])


def test_compiles_without_graph_breaks():
    sparse = sparsify(network(), masks_of(network()))
    sparse[5].layout = "feature"
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    for examples in (4, 7):
        x = torch.randn(examples, 3, 8, 8)
        torch.testing.assert_close(compiled(x), sparse(x))
        expected = torch.autograd.grad(sparse(x).square().sum(), list(sparse.parameters()))
        actual = torch.autograd.grad(compiled(x).square().sum(), list(sparse.parameters()))
        torch.testing.assert_close(actual, expected)


def test_autocast_hands_sparse_layers_what_dense_ones_give():
    sparse = sparsify(network(), {"2.weight": masks_of(network())["2.weight"]})
    sparse = sparsify(sparse, {"7.weight": masks_of(network())["7.weight"]})
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), sparse(x), rtol=0.05, atol=0.05)
    y.sum().backward()
    assert sparse[7].values.grad.dtype == torch.float32
