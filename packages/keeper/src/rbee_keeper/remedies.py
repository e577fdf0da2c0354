"""What a person can do about an error, where the error itself does not say it."""

from rbee_contracts.errors import RbeeError

_BY_CODE = {
    "hive_id_needed": "add --hive-id NAME; see: rbee hive list",
    "job_not_found": "see which jobs there are: rbee job list",
    "output_expired": "see how it ended: rbee job show JOB_ID",
    "worker_not_found": "see which workers there are: rbee worker list",
    "not_implemented": "ask the service that owns it, a queen with --queen, a hive with --hive",
    "shutting_down": "try again when it has started again",
}


def remedy(error: RbeeError, url: str) -> tuple[str, str | None]:
    """Give what went wrong and what to do; None where what went wrong says it already."""
    if error.code == "unreachable":
        return (
            f"no answer from {url}.",
            "start rbee on this machine with: rbee up; or say where it runs: --queen URL (or RBEE_QUEEN_URL)",
        )
    return error.details, _BY_CODE.get(error.code)
