"""What a person can do about an error, where the error itself does not say it."""

from rbee_contracts.errors import RbeeError

_BY_CODE = {
    "hive_id_needed": "Add --hive-id NAME; see: rbee hive list",
    "job_not_found": "See which jobs there are: rbee job list",
    "output_expired": "See how it ended: rbee job show JOB_ID",
    "unauthorized": "Give its token: RBEE_TOKEN, or --token-file FILE.",
    "not_implemented": "Ask another service, with --queen or --hive, or bring this one up to date.",
    "shutting_down": "Try again when it has started again.",
}


def explain(error: RbeeError, url: str) -> str:
    """Say what went wrong and what to do about it."""
    if error.code == "unreachable":
        return (
            f"no answer from {url}. Start rbee on this machine with `rbee up`, "
            "or say where it runs: --queen URL (or RBEE_QUEEN_URL), --hive URL"
        )
    remedy = _BY_CODE.get(error.code)
    return error.details if remedy is None else f"{error.details} {remedy}"
