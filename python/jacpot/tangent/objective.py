"""A network's mean loss as a function of its parameters, and its quadratic model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jacpot.nn.stand_ins import call_with
from jacpot.nn.worn import check_writable, merged_mask, plain_parameters
from jacpot.tangent.batches import sample
from jacpot.tangent.jacobian import jacobian
from jacpot.tangent.losses import Loss, flat_targets
from jacpot.tangent.network import Inputs, Output, arguments, n_examples, part_of, take
from jacpot.tangent.quadratic_model import QuadraticModel

__all__ = ["Evaluation", "Objective"]

CURVATURE = 4000  # examples that the curvature is taken from, at most; the gradient from all
LEAST = 1000  # that it is taken from, at least
PORTION = 2  # of them for each that the trace of the loss's Hessian lies in, by Kish's measure
SLICE = 1024  # examples whose Hessians are in memory at once, to measure them


@dataclass(frozen=True)
class Evaluation:
    """The mean loss of some examples at some parameters, with what its gradient needs.

    Attributes
    ----------
    leaves : dict of Tensor
        The trained parameters, which the outputs are differentiated by.
    outputs : Tensor
        (N, K).
    targets : Tensor
    value : float
    """

    leaves: dict[str, Tensor]
    outputs: Tensor
    targets: Tensor
    value: float


class Objective:
    """The mean loss of some examples as a function of the module's parameters.

    Attributes
    ----------
    weights : dict of Tensor
        The parameters that are trained or masked, by name, masked. The module has them from the
        first `take` on.
    """

    def __init__(
        self,
        module: nn.Module,
        x: Inputs,
        y: Tensor,
        loss: Loss,
        mask: Mapping[str, Tensor] | None,
        output: Output | None,
    ) -> None:
        self.module, self.x, self.y, self.loss, self.output = module, x, y, loss, output
        check_writable(module)
        self.mask = merged_mask(module, mask)
        every = plain_parameters(module)
        self._trained = [name for name, (_, p) in every.items() if p.requires_grad]
        self._own = {name: every[name] for name in {**dict.fromkeys(self._trained), **self.mask}}
        self.weights = {
            name: torch.where(self.mask[name], p.detach(), 0) if name in self.mask else p.detach()
            for name, (_, p) in self._own.items()
        }
        self._targets: Tensor | None = None

    def model(
        self, examples: slice | Tensor, at: Evaluation | None, generator: torch.Generator
    ) -> QuadraticModel | None:
        """Give the quadratic model at the module's parameters; None where there is nothing."""
        if self._targets is None:
            self._check()
        if n_examples(self.x) == 0:
            return None
        at = at or self.evaluate(self.weights, examples)
        some, weights = self._choose(at, generator)
        columns = jacobian(
            self.module, take(take(self.x, examples), some), self.mask, output=self.output
        )
        if 0 in columns.shape:
            return None
        f, y = columns.outputs.double(), at.targets[some]
        value, slope = self.loss.value(f, y), self.loss.gradient(f, y)

        def above(change: Tensor) -> float:
            rise = self.loss.value(f + change, y) - value - (slope * change).sum(1)
            return float((weights * rise).mean())

        root = self._root(f, y) * weights.sqrt()[:, None, None]
        return QuadraticModel(columns, root, self.gradient(at), at.value, above, generator)

    def _root(self, f: Tensor, y: Tensor) -> Tensor:
        root: Tensor = getattr(self.loss, "majorant_root", self.loss.root)(f, y)
        return root

    def _choose(self, at: Evaluation, generator: torch.Generator) -> tuple[slice | Tensor, Tensor]:
        """Choose whose curvature is taken, and its weights: those that have much of it."""
        f = at.outputs.detach().double()
        n = len(f)
        if n <= LEAST:
            return slice(None), f.new_ones(n)
        parts = zip(torch.split(f, SLICE), torch.split(at.targets, SLICE), strict=True)
        sizes = torch.cat([self._root(*part).square().sum((1, 2)) for part in parts])
        if not 0 < float(sizes.sum()) < float("inf"):
            sizes = torch.ones_like(sizes)
        sizes /= sizes.mean()
        effective = n / float(sizes.square().mean())
        return sample(sizes, min(CURVATURE, max(LEAST, int(PORTION * effective))), generator)

    def _check(self) -> None:
        """Check the targets of all examples, also of those that come later."""
        columns = jacobian(self.module, take(self.x, slice(1)), self.mask, output=self.output)
        alike = columns.outputs.expand(n_examples(self.x), -1)
        y = flat_targets(self.y, alike, columns.output_shape)
        self._targets = self.loss.check(y, alike)

    def evaluate(self, weights: Mapping[str, Tensor], examples: slice | Tensor) -> Evaluation:
        """Evaluate the loss at other parameters; the module keeps its own."""
        assert self._targets is not None
        with torch.inference_mode(False), torch.enable_grad():
            leaves = {n: weights[n].detach().requires_grad_() for n in self._trained}
            outputs = self._outputs({**weights, **leaves}, take(self.x, examples))
        f = outputs.detach().double()
        y = self._targets[examples]
        return Evaluation(leaves, outputs, y, float(self.loss.value(f, y).mean()))

    def gradient(self, at: Evaluation) -> dict[str, Tensor]:
        """Differentiate what was evaluated: once."""
        outputs = at.outputs
        pull = self.loss.gradient(outputs.detach().double(), at.targets) / len(outputs)
        slopes = tuple(map(torch.zeros_like, at.leaves.values()))
        if outputs.requires_grad:
            with torch.inference_mode(False):
                slopes = torch.autograd.grad(
                    outputs, list(at.leaves.values()), pull.to(outputs.dtype),
                    materialize_grads=True,
                )  # fmt: skip
        return dict(zip(at.leaves, slopes, strict=True))

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Set the module's parameters."""
        # One call, so that an interrupt comes before or after all of them.
        torch._foreach_copy_([p for _, p in self._own.values()], [weights[n] for n in self._own])
        self.weights = {name: p.detach() for name, (_, p) in self._own.items()}

    def _outputs(self, weights: Mapping[str, Tensor], x: Inputs) -> Tensor:
        own = {self._own[name][0]: weight for name, weight in weights.items()}
        part = part_of(call_with(self.module, own, *arguments(x)), self.output)
        return part.reshape(len(part), -1)
