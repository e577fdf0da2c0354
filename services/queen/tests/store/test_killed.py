"""A queen that is killed loses nothing that it was told is stored."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rbee_records import job_id

from rbee_queen.store import StoredJob
from rbee_queen.store.sql import SqlStore

JOBS_IN_A_BATCH = 5


def write_until_killed(url: str) -> int:
    """Give how many batches were reported as written before the process was killed."""
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("writing_queen.py"), url],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert process.stdout is not None
    with process:
        reported = [process.stdout.readline() for _ in range(random.randint(1, 60))]
        process.kill()
        reported += process.stdout.readlines()
    assert process.returncode == -signal.SIGKILL
    assert reported == [f"{number}\n" for number in range(len(reported))]
    return len(reported)


def is_whole(job: StoredJob) -> bool:
    return [event.n for event in job.events] == [1, 2, 3] and len(job.steps) == 1 and job.has_spoken


@pytest.mark.parametrize("attempt", range(3))
def test_every_batch_that_was_reported_is_there_and_none_in_part(database_url: str, attempt: int) -> None:
    reported = write_until_killed(database_url)

    store = SqlStore(database_url)
    store.open()
    finished, unfinished = store.finished_since(""), store.unfinished()
    store.close()

    found = sorted(job.accepted.seq for job in [*finished, *unfinished])
    batches, rest = divmod(len(found), JOBS_IN_A_BATCH)
    assert rest == 0
    assert batches in {reported, reported + 1}
    assert found == list(range(1, len(found) + 1))
    assert (len(finished), len(unfinished)) == (3 * batches, 2 * batches)
    assert all(is_whole(job) for job in [*finished, *unfinished])
    assert {job.accepted.job_id for job in unfinished} == {
        job_id(seq) for seq in found if (seq - 1) % JOBS_IN_A_BATCH >= 3
    }
