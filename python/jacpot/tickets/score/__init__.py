"""How much each weight is worth: the scores that :func:`jacpot.tickets.prune` ranks.

Every score is a dict from parameter name to a tensor of the parameter's shape, and higher means
keep. Scoring is pure: weights, gradients, buffers, training mode and random state are bitwise as
they were. ``mask`` says where to score: the network is evaluated at the masked weights, pruned
weights score as such (zero for scores that multiply by the weight), and only the parameters that
it names are scored; by default those of :meth:`jacpot.Mask.ones`.
"""

from jacpot.tickets.score.flow import synflow
from jacpot.tickets.score.gradient import grasp, snip
from jacpot.tickets.score.kernel import fisher, ntk
from jacpot.tickets.score.plain import magnitude, random

__all__ = ["fisher", "grasp", "magnitude", "ntk", "random", "snip", "synflow"]
