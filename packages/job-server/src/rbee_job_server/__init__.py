"""Jobs and their event streams: the part of rbee that every service shares."""

from rbee_job_server.app import build_app
from rbee_job_server.context import JobContext, current_job, narrate
from rbee_job_server.jobs import CancelReason
from rbee_job_server.logs import configure_logging
from rbee_job_server.relay import LowerJobFailed, LowerService, Relay
from rbee_job_server.serve import CannotBind, ServeConfig, ServiceFailed, adopt, bind, serve
from rbee_job_server.server import Handlers, JobServer, JobServerConfig, Submission
from rbee_job_server.streams import EventStreamResponse

__all__ = [
    "CancelReason",
    "CannotBind",
    "EventStreamResponse",
    "Handlers",
    "JobContext",
    "JobServer",
    "JobServerConfig",
    "LowerJobFailed",
    "LowerService",
    "Relay",
    "ServeConfig",
    "ServiceFailed",
    "Submission",
    "adopt",
    "bind",
    "build_app",
    "configure_logging",
    "current_job",
    "narrate",
    "serve",
]
