"""Errors that cross a service boundary, as exceptions and as the one error body.

The tree is shallow and cut by what the caller can do:

    RbeeError                something failed here; the caller can do nothing
    ├── InvalidRequest       mend the request
    ├── BodyTooLarge         send less
    ├── Unauthorized         bring the cluster's token
    ├── Forbidden            come from a host or a page that is allowed here
    ├── NotFound             name something that exists
    ├── Gone                 it existed; it is not kept any more
    ├── Conflict             it is in another state than the request needs
    ├── NotImplementedHere   this version has no handler for it
    ├── NoCapacity           try again later, or add capacity
    ├── Unavailable          the service cannot serve now (starting, stopping, peer unreachable)
    ├── DeadlineExceeded     allow more time
    └── WorkerLost           the worker or its engine died under the job

An error knows its `code` (stable, snake_case) and whether a retry may help. It knows no HTTP.
"""

from typing import ClassVar

from msgspec import Struct


class ErrorBody(Struct, frozen=True, kw_only=True):
    """Body of every answer of the job routes that is not a success."""

    error: str
    details: str
    code: str
    correlation_id: str = ""


class RbeeError(Exception):
    """Root of rbee's errors.

    Args:
        details: what happened, to which id, and what to do about it.
        code: overrides the class's `code` where a more exact one exists.
        title: overrides the class's `title`.
        retryable: overrides the class's `retryable`.
    """

    title: ClassVar[str] = "Internal error"
    default_code: ClassVar[str] = "internal_error"
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        details: str,
        *,
        code: str | None = None,
        title: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(details)
        self.details = details
        self.code = code or self.default_code
        self.error = title or self.title
        self.retryable = self.default_retryable if retryable is None else retryable
        self.actor: str | None = None
        """Who failed, where it was a service below; None where it was this one."""

    def body(self, correlation_id: str = "") -> ErrorBody:
        return ErrorBody(
            error=self.error, details=self.details, code=self.code, correlation_id=correlation_id
        )


class InvalidRequest(RbeeError):
    title = "Invalid request"
    default_code = "invalid_request"


class BodyTooLarge(RbeeError):
    title = "Body too large"
    default_code = "body_too_large"


class Unauthorized(RbeeError):
    title = "Unauthorized"
    default_code = "unauthorized"


class Forbidden(RbeeError):
    title = "Forbidden"
    default_code = "forbidden"


class NotFound(RbeeError):
    title = "Not found"
    default_code = "not_found"


class Gone(RbeeError):
    title = "Gone"
    default_code = "gone"


class Conflict(RbeeError):
    title = "Conflict"
    default_code = "conflict"


class NotImplementedHere(RbeeError):
    title = "Not implemented"
    default_code = "not_implemented"


class NoCapacity(RbeeError):
    title = "No capacity"
    default_code = "no_capacity"
    default_retryable = True


class Unavailable(RbeeError):
    title = "Unavailable"
    default_code = "unavailable"
    default_retryable = True


class DeadlineExceeded(RbeeError):
    title = "Deadline exceeded"
    default_code = "timeout"
    default_retryable = True


class WorkerLost(RbeeError):
    title = "Worker lost"
    default_code = "worker_lost"
