"""Networks of random layers, with branches and layers that are used twice, against autograd."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import by_autograd, check_operations
from torch import nn

import jacpot

LAYERS = {
    "linear": lambda h: nn.Linear(h.shape[-1], 3),
    "convolution": lambda h: nn.Conv1d(h.shape[1], 4, 2, padding=1),
    "transposed": lambda h: nn.ConvTranspose1d(h.shape[1], 2, 2, stride=2),
    "one place": lambda h: nn.ConvTranspose1d(h.shape[1], h.shape[1], 1),
    "layer norm": lambda h: nn.LayerNorm(h.shape[1:]),
    "batch norm": lambda h: nn.BatchNorm1d(h.shape[1]),
    "attention": lambda h: nn.TransformerEncoderLayer(h.shape[-1], 1, 3, batch_first=True),
    "slopes": lambda h: nn.PReLU(h.shape[1]),
    "relu": lambda h: nn.ReLU(),
    "tanh": lambda h: nn.Tanh(),
    "gelu": lambda h: nn.GELU(),
    "pool": lambda h: nn.AdaptiveAvgPool1d(1),
}


class Random(nn.Module):
    """Every layer takes what an earlier one gave, and may be called on its own result."""

    def __init__(self, steps):
        super().__init__()
        self.layers, self.plan = nn.ModuleList(), []
        values = [torch.randn(2, 2, 4, dtype=torch.float64)]
        for kind, source, again, added in steps:
            h = values[-1 - source % len(values)]
            layer = LAYERS[kind](h).double().eval()
            try:
                value = layer(h)
                value = layer(value) if again else value
            except (RuntimeError, ValueError):  # of other sizes than it gives
                continue
            self.layers.append(layer)
            self.plan.append((len(values) - 1 - source % len(values), again, added))
            values.append(self._added(value, h, added))
        self.head = nn.Linear(values[-1].flatten(1).shape[1], 2, dtype=torch.float64)

    def _added(self, value, h, added):
        return value + h if added and value.shape == h.shape else value

    def forward(self, x):
        values = [x]
        for layer, (source, again, added) in zip(self.layers, self.plan, strict=True):
            value = layer(values[source])
            value = layer(value) if again else value
            values.append(self._added(value, values[source], added))
        return F.softplus(self.head(values[-1].flatten(1)))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(sorted(LAYERS)), st.sampled_from([0, 0, 0, 1, 2]), st.booleans(),
        st.booleans(),
    ),
    min_size=1, max_size=5,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*has no layer rule")
@given(STEPS, st.integers(1, 4), st.sampled_from([1 << 30, 1]), st.booleans())
@settings(max_examples=40)
def test_of_random_layers(steps, n, memory_budget, masked):
    torch.manual_seed(n)
    net = Random(steps)
    x = torch.randn(n, 2, 4, dtype=torch.float64)
    expected = by_autograd(net, x)
    J = jacpot.jacobian(net, x, memory_budget=memory_budget)
    check_operations(J, expected, jacpot.jacobian(net, x[:1]), expected[:1])
    if masked:
        mask = {name: torch.rand(p.shape) < 0.5 for name, p in net.named_parameters()}
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.mul_(mask[name])
        kept = torch.cat([part.flatten() for part in mask.values()])
        expected = by_autograd(net, x)[:, :, kept]
        first = jacpot.jacobian(net, x[:1], mask=mask)
        check_operations(jacpot.jacobian(net, x, mask=mask), expected, first, expected[:1])


def often(net, x):
    for _ in range(4):
        jacpot.jacobian(net, x)


@pytest.mark.filterwarnings("ignore:.*has no layer rule")
def test_an_interrupt_leaves_the_module_as_it_was():
    net = Random(
        [(kind, 0, True, True) for kind in ("linear", "attention", "slopes", "batch norm")]
    )
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    expected = jacpot.jacobian(net, x).dense()
    found = {name: (dict(vars(m)), dict(m._parameters)) for name, m in net.named_modules()}
    for layer in net.layers:
        for call in range(1, 5):
            calls = []

            def stop(*_, calls=calls, call=call):
                calls.append(None)
                if len(calls) == call:
                    raise KeyboardInterrupt

            hook = layer.register_forward_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                often(net, x)
            hook.remove()
            for name, m in net.named_modules():
                attributes, parameters = found[name]
                assert vars(m).keys() == attributes.keys()
                assert all(m._parameters[key] is p for key, p in parameters.items())
            assert torch.is_grad_enabled()
            assert torch.equal(jacpot.jacobian(net, x).dense(), expected)
