"""What a hive still runs for this queen, though the queen has given it up: decided from two lists."""

from collections.abc import Iterable

from msgspec import Struct


class SentStep(Struct, frozen=True, kw_only=True):
    """One step of a job of ours that was sent to a hive.

    Args:
        is_over: its job has ended, or goes on with a later attempt.
    """

    lower_job_id: str
    is_over: bool


def strays(running: Iterable[str], sent: Iterable[SentStep]) -> list[str]:
    """Give the jobs among those `running` on a hive that nobody waits for any more, in that order.

    Jobs that this queen did not send are somebody else's and are left alone.
    """
    over = {step.lower_job_id for step in sent if step.is_over}
    return [job_id for job_id in running if job_id in over]
