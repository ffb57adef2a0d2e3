"""The tangent kernel by neural-tangents: computes once per line on stdin, then says "done".

Run by bench_ntk.py with a Python that has neural-tangents; takes a folder with ``problem.npz``
(inputs and parameters in PyTorch's layout) and leaves ``kernel.npy`` there the first time.
"""

import sys
from pathlib import Path

import jax
import neural_tangents as nt
import numpy as np
from jax import lax
from jax import numpy as jnp

folder, outputs = Path(sys.argv[1]), sys.argv[2]
problem = dict(np.load(folder / "problem.npz"))
x = jnp.asarray(problem.pop("x"))
names = sorted({name.rsplit(".", 1)[0] for name in problem}, key=int)
parameters = []
for name in names:
    w = problem[f"{name}.weight"]
    # A transposed parameter inside the network would hide its structure from neural-tangents.
    w = w.T if w.ndim == 2 else w
    parameters.append((jnp.asarray(w), jnp.asarray(problem[f"{name}.bias"])))


def network(params, y):
    for i, (w, b) in enumerate(params):
        if w.ndim == 4:
            y = lax.conv_general_dilated(
                y, w, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
            )
            y = y + b[None, :, None, None]
        else:
            y = y.reshape(len(y), -1) @ w + b
        if i + 1 < len(params):
            y = jax.nn.relu(y)
    return y


kernel_fn = jax.jit(
    nt.empirical_ntk_fn(
        network,
        trace_axes=(-1,) if outputs == "trace" else (),
        vmap_axes=0,
        implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES,
    )
)
first = True
for _ in sys.stdin:
    kernel = kernel_fn(x, None, parameters)
    kernel.block_until_ready()
    if first:
        # (N, M, K, K) to (N, K, M, K); a trace is an average there
        k = parameters[-1][0].shape[1]
        kernel = kernel * k if outputs == "trace" else kernel.transpose(0, 2, 1, 3)
        np.save(folder / "kernel.npy", np.ascontiguousarray(kernel))
        first = False
    print("done", flush=True)
