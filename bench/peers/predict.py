"""What gradient descent on the linearized network predicts, by neural-tangents, for bench_fit.py.

Its kernels, and its closed form in infinite time; as the ridge, ``diag_reg``.
"""

import jax
import neural_tangents as nt
from jax import numpy as jnp
from problem import answer, arrays, network, parameters

x, y, x_test = (jnp.asarray(arrays[name]) for name in ("x", "y", "x_test"))
ridge = float(arrays["ridge"])
kernel_fn = jax.jit(
    nt.empirical_ntk_fn(
        network,
        trace_axes=(),
        vmap_axes=0,
        implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES,
    )
)


def predict():
    after = nt.predict.gradient_descent_mse(
        kernel_fn(x, None, parameters),
        y,
        diag_reg=ridge,
        diag_reg_absolute_scale=True,
        trace_axes=(),
    )
    cross = kernel_fn(x_test, x, parameters)
    return after(None, network(parameters, x), network(parameters, x_test), cross)[1]


answer(predict)
