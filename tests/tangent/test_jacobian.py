import copy

import numpy
import pytest
import torch
from oracle import dense, relative_error
from torch import nn

import jacpot


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    ).to(dtype)


def cnn(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).to(dtype)


SHAPES = {mlp: (6,), cnn: (2, 6, 6)}


def examples(make, n, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(n, *SHAPES[make], dtype=dtype)


def some_mask(module, density=0.6):
    torch.manual_seed(2)
    return {name: torch.rand(p.shape) < density for name, p in module.named_parameters()}


def state_of(module):
    return (
        {k: (v.clone(), v._version, v.requires_grad) for k, v in module.named_parameters()},
        {k: (v.clone(), v._version) for k, v in module.named_buffers()},
        [(m.training, dict(m._forward_hooks), set(vars(m))) for m in module.modules()],
    )


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7])
def test_agrees_with_torch_func(make, n):
    net, x = make(), examples(make, n)
    J = jacpot.jacobian(net, x)
    p = sum(parameter.numel() for parameter in net.parameters())
    assert J.shape == (n * 3, p)
    assert (J.n_examples, J.n_outputs, J.n_parameters) == (n, 3, p)
    expected = dense(net, x) if n else torch.zeros(0, 3, p, dtype=torch.float64)
    v, u = torch.randn(p, 2, dtype=torch.float64), torch.randn(n, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(J.outputs, net(x).detach())
    assert relative_error(J.dense(), expected) < 1e-10
    assert relative_error(J @ v, expected @ v) < 1e-10
    assert relative_error(J @ v[:, 0], expected @ v[:, 0]) < 1e-10
    assert relative_error(J.T @ u, torch.einsum("nkp,nkr->pr", expected, u)) < 1e-10
    assert relative_error(J.T @ u[..., 0], torch.einsum("nkp,nk->p", expected, u[..., 0])) < 1e-10
    assert relative_error(J.gram(), torch.einsum("nkp,mlp->nkml", expected, expected)) < 1e-10
    assert relative_error(J.row_norms(), expected.norm(dim=2)) < 1e-10
    assert relative_error(J.column_norms(), expected.norm(dim=(0, 1))) < 1e-10


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
def test_kernel_agrees_with_torch_func(make, outputs):
    net, x1, x2 = make(), examples(make, 7), examples(make, 4).flip(0)
    rule = {"full": "nkp,mlp->nkml", "trace": "nkp,mkp->nm", "diagonal": "nkp,mkp->nmk"}[outputs]
    left, right = dense(net, x1), dense(net, x2)
    cross = jacpot.ntk(net, x1, x2, outputs=outputs)
    assert relative_error(cross, torch.einsum(rule, left, right)) < 1e-10
    own = jacpot.ntk(net, x1, outputs=outputs)
    assert relative_error(own, torch.einsum(rule, left, left)) < 1e-10


@pytest.mark.parametrize("make", [mlp, cnn])
def test_kernel_is_symmetric_and_positive_semidefinite(make):
    gram = jacpot.ntk(make(), examples(make, 7)).reshape(21, 21)
    assert torch.equal(gram, gram.T)
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert eigenvalues[0] >= -1e-12 * eigenvalues[-1]


@pytest.mark.parametrize("make", [mlp, cnn])
def test_product_equals_a_finite_difference(make):
    net, x, step = make(), examples(make, 5), 1e-5
    J = jacpot.jacobian(net, x)
    v = torch.randn(J.n_parameters, dtype=torch.float64)
    theta = nn.utils.parameters_to_vector(net.parameters()).detach()
    shifted = []
    for sign in (1, -1):
        moved = copy.deepcopy(net)
        nn.utils.vector_to_parameters(theta + sign * step * v, moved.parameters())
        shifted.append(moved(x).detach())
    torch.testing.assert_close(J @ v, (shifted[0] - shifted[1]) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("masked", [False, True])
def test_transpose_is_adjoint(make, dtype, masked):
    net = make(dtype)
    J = jacpot.jacobian(net, examples(make, 7, dtype), mask=some_mask(net) if masked else None)
    v, u = torch.randn(J.n_parameters, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    left, right = ((J @ v) * u).sum(), v @ (J.T @ u)
    bound = (J @ v).norm() * u.norm()
    assert (left - right).abs() <= 32 * torch.finfo(dtype).eps * bound


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("wrt", ["kept", "all"])
def test_a_mask_restricts_and_evaluates_at_masked_weights(make, wrt):
    net, x = make(), examples(make, 7)
    mask = some_mask(net)
    J = jacpot.jacobian(net, x, mask=mask, wrt=wrt)
    expected = dense(net, x, mask, wrt)
    assert relative_error(J.dense(), expected) < 1e-10
    v = torch.randn(J.n_parameters, dtype=torch.float64)
    assert relative_error(J @ v, expected @ v) < 1e-10
    assert relative_error(J @ J.unflatten(v), expected @ v) < 1e-10
    assert torch.equal(J.flatten(J.unflatten(v)), v)
    assert relative_error(J.gram(), torch.einsum("nkp,mlp->nkml", expected, expected)) < 1e-10


def test_the_module_is_left_as_found():
    net = cnn()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net[2].weight.requires_grad_(False)
    before, grad = state_of(net), net[0].weight.grad.clone()
    jacpot.jacobian(net, examples(cnn, 3), mask={"0.weight": torch.rand(4, 2, 3, 3) > 0.5})
    with pytest.raises(RuntimeError):
        jacpot.jacobian(net, torch.randn(3, 5, 6, 6, dtype=torch.float64))
    after = state_of(net)
    for (value, *rest), (again, *rest_again) in zip(
        before[0].values(), after[0].values(), strict=True
    ):
        assert torch.equal(value, again)
        assert rest == rest_again
    assert before[2] == after[2]
    assert torch.equal(net[0].weight.grad, grad)
    assert net[2].weight.grad is None


def test_frozen_parameters_are_constants():
    net, x = mlp(), examples(mlp, 3)
    full = dense(net, x)
    net[0].requires_grad_(False)
    J = jacpot.jacobian(net, x)
    assert relative_error(J.dense(), full[:, :, 56:]) < 1e-10


def test_parts_join_to_the_same():
    net, x = cnn(), examples(cnn, 7)
    whole, parts = jacpot.jacobian(net, x), jacpot.jacobian(net, x, memory_budget=1)
    assert relative_error(parts.dense(), whole.dense()) < 1e-12


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_recorded_in_any_mode(mode):
    net, x = mlp(), examples(mlp, 3)
    with mode():
        found = jacpot.jacobian(net, x).dense()
    assert relative_error(found, dense(net, x)) < 1e-10
    assert not found.requires_grad


def test_examples_of_inference_mode_are_taken():
    net, x = mlp(), examples(mlp, 3)
    with torch.inference_mode():
        copy_of_x = x.clone()
        found = jacpot.jacobian(net, copy_of_x).dense()
    again = jacpot.jacobian(net, copy_of_x).dense()
    assert relative_error(found, dense(net, x)) < 1e-10
    assert torch.equal(found, again)


def test_a_network_that_writes_to_its_input_leaves_ours():
    net, x = nn.Sequential(nn.ReLU(inplace=True), mlp()), examples(mlp, 5)
    before = x.clone()
    found = jacpot.jacobian(net, x).dense()
    assert torch.equal(x, before)
    assert relative_error(found, dense(mlp(), x.relu())) < 1e-10


def test_autocast_is_off_inside():
    net, x = mlp(torch.float32), examples(mlp, 3, torch.float32)
    expected = jacpot.jacobian(net, x).dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(jacpot.jacobian(net, x).dense(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scipy(dtype):
    net = cnn(dtype)
    J = jacpot.jacobian(net, examples(cnn, 5, dtype), mask=some_mask(net))
    operator, rows = J.to_scipy(), J.dense().flatten(0, 1).numpy()
    assert operator.shape == J.shape
    assert operator.dtype == rows.dtype
    v, u = numpy.random.default_rng(0), numpy.random.default_rng(1)
    v, u = v.normal(size=(J.shape[1], 3)), u.normal(size=(J.shape[0], 3))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10}
    numpy.testing.assert_allclose(operator @ v, rows @ v, **tolerance)
    numpy.testing.assert_allclose(operator @ v[:, 0], rows @ v[:, 0], **tolerance)
    numpy.testing.assert_allclose(operator.T @ u, rows.T @ u, **tolerance)
    numpy.testing.assert_allclose(operator.T @ u[:, 0], rows.T @ u[:, 0], **tolerance)


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x):
        return self.fc(x - x.mean(0))


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x):
        return nn.functional.dropout(self.fc(x), 0.5, training=True)


class InPlace(nn.Module):
    def __init__(self, scale=False):
        super().__init__()
        self.a = nn.Linear(6, 6, dtype=torch.float64)
        self.b = nn.Linear(6, 6, dtype=torch.float64)
        self.scale = nn.Parameter(torch.ones(6, dtype=torch.float64)) if scale else 1

    def forward(self, x):
        h = self.a(x)
        y = self.b(h)
        h += 1
        return h + self.scale * y


def refused_masks():
    return [
        ({"nothing": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask.*nothing"),
        ({"0.weight": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask.*\(8, 6\).*\(3,\)"),
        ({"0.weight": torch.ones(8, 6)}, TypeError, "mask.*bool.*float32"),
        ([1], TypeError, "mask.*mapping.*list"),
    ]


@pytest.mark.parametrize(("mask", "error", "message"), refused_masks())
def test_refuses_masks_that_do_not_fit(mask, error, message):
    with pytest.raises(error, match=message):
        jacpot.jacobian(mlp(), examples(mlp, 2), mask=mask)


def refused_modules():
    x = examples(mlp, 4)
    return [
        (nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).double(), x, ValueError, r"'1'.*eval"),
        (
            nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False))
            .double()
            .eval(),
            x,
            ValueError,
            "'1'.*statistics",
        ),
        (nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.1)).double(), x, ValueError, r"'1'.*eval"),
        (nn.Sequential(), x, ValueError, "without parameters"),
        (mlp().requires_grad_(False), x, ValueError, "only frozen"),
        ("net", x, TypeError, "module.*str"),
        (mlp(), torch.ones(4, 6, dtype=torch.int64), TypeError, "'0'.*int64"),
        (mlp(), x.float(), TypeError, "'0'.*float32"),
        (mlp(), [[1.0]], TypeError, "'x'"),
        (mlp().half(), x.half(), TypeError, "float32.*float16"),
        (mlp(), x * float("nan"), ValueError, "finite"),
        (mlp(), x * float("inf"), ValueError, "finite"),
        (Mixer(), x, ValueError, "other examples"),
        (Noise(), x, ValueError, "chance"),
        (InPlace(), x, RuntimeError, "'b'.*out of place"),
        (InPlace(scale=True), x, RuntimeError, "'b'.*out of place"),
        (nn.Sequential(mlp(), nn.Flatten(0)), x, ValueError, "leading axis"),
    ]


@pytest.mark.parametrize(("module", "x", "error", "message"), refused_modules())
def test_refuses(module, x, error, message):
    with pytest.raises(error, match=message):
        jacpot.jacobian(module, x)


def test_refuses_vectors_that_do_not_fit():
    net = mlp()
    J = jacpot.jacobian(net, examples(mlp, 4))
    with pytest.raises(TypeError, match=r"'v'.*float64.*float32"):
        J @ torch.zeros(J.n_parameters)
    with pytest.raises(ValueError, match="'v'"):
        J @ torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="'u'"):
        J.T @ torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="'tensors' must name"):
        J @ {"0.weight": torch.zeros(8, 6, dtype=torch.float64)}
    with pytest.raises(ValueError, match="wrt"):
        jacpot.jacobian(net, examples(mlp, 4), wrt="some")
