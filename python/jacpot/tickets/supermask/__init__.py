"""Supermasks: networks that learn by choosing among weights that stay at their random values."""

from jacpot.tickets.supermask.build import Supermask, supermask
from jacpot.tickets.supermask.criteria import criterion, rebuild

__all__ = ["Supermask", "criterion", "rebuild", "supermask"]
