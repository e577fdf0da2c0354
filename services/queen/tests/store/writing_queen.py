"""A process that writes batches for ever and says which ones are in the store. It is meant to be killed."""

import sys
from itertools import count

from rbee_records import narrated, whole_job

from rbee_queen.store import Record
from rbee_queen.store.sql import SqlStore

JOBS_IN_A_BATCH = 5


def batch(number: int) -> list[Record]:
    """Give the records of five jobs: three that end, two that do not."""
    records: list[Record] = []
    for place in range(JOBS_IN_A_BATCH):
        seq = number * JOBS_IN_A_BATCH + place + 1
        job = whole_job(seq)
        records += job if place < 3 else [*job[:-1], narrated(seq, 3, body=b"x" * 3000)]
    return records


def main() -> None:
    store = SqlStore(sys.argv[1])
    store.open()
    for number in count():
        store.write(batch(number))
        print(number, flush=True)


if __name__ == "__main__":
    main()
