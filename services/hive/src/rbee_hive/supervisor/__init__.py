"""The supervisor: a pure state machine for each worker, and the shell that starts, watches and ends them."""

from rbee_hive.supervisor.machine import Policy

__all__ = ["Policy"]
