"""Client of the job contract: submit, stream with resume, follow, cancel."""

from rbee_job_client.client import JobClient, Timeouts
from rbee_job_client.errors import ProtocolError, Rejected, StreamCut, Unreachable

__all__ = ["JobClient", "ProtocolError", "Rejected", "StreamCut", "Timeouts", "Unreachable"]
