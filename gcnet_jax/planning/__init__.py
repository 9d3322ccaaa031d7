"""Knowing before renting: compiles the real training step for a TPU that is not there."""

from gcnet_jax.planning.chips import CHIPS, Chip, PlanError, parse_topology, prepare_process
from gcnet_jax.planning.durations import announcer
from gcnet_jax.planning.plan import Plan, make_plan, make_plans
from gcnet_jax.planning.program import Program
from gcnet_jax.planning.report import format_plans, format_progress, plan_to_dict

__all__ = [
    'CHIPS',
    'Chip',
    'Plan',
    'PlanError',
    'Program',
    'announcer',
    'format_plans',
    'format_progress',
    'make_plan',
    'make_plans',
    'parse_topology',
    'plan_to_dict',
    'prepare_process',
]
