"""The simulated engine: a model of a GPU engine, for load tests and simulation; never a default."""

from rbee_worker.engine.sim.engine import SimEngine
from rbee_worker.engine.sim.parameters import SimParameters, add_arguments, from_args

__all__ = ["SimEngine", "SimParameters", "add_arguments", "from_args"]
