"""Promised memory: never more than there is, whatever comes in whatever order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rbee_contracts.errors import NoCapacity
from rbee_hive.devices.reservations import DeviceKey, Reservations

GIB = 1 << 30
GPU0: DeviceKey = ("cuda", 0)
GPU1: DeviceKey = ("cuda", 1)
CPU: DeviceKey = ("cpu", 0)


def two_gpus(kept_free: dict[DeviceKey, int] | None = None) -> Reservations:
    reservations = Reservations(kept_free)
    reservations.update({GPU0: 80 * GIB, GPU1: 80 * GIB, CPU: 64 * GIB})
    return reservations


def test_the_second_spawn_does_not_get_what_the_first_was_promised() -> None:
    reservations = two_gpus()
    reservations.reserve("first-a1", [GPU0], 72 * GIB)

    with pytest.raises(NoCapacity) as raised:
        reservations.reserve("second-b2", [GPU0], 72 * GIB)

    assert raised.value.code == "no_device_memory"
    assert raised.value.details == (
        "The worker needs 72.0 GiB on cuda:0, where 8.0 GiB of 80.0 GiB are left: 72.0 GiB are promised to "
        "first-a1. Stop a worker there, or give each less in its worker_args (--gpu-memory-utilization or "
        "--kv-cache-memory-bytes)."
    )
    assert reservations.of("second-b2") is None


def test_all_devices_or_none() -> None:
    reservations = two_gpus()
    reservations.reserve("a", [GPU1], 50 * GIB)

    with pytest.raises(NoCapacity, match="cuda:1"):
        reservations.reserve("b", [GPU0, GPU1], 40 * GIB)

    assert reservations.reserved(GPU0) == 0


def test_released_memory_can_be_promised_again() -> None:
    reservations = two_gpus()
    reservations.reserve("a", [GPU0, GPU1], 80 * GIB)
    reservations.release("a")
    reservations.release("a")

    reservations.reserve("b", [GPU0], 80 * GIB)

    assert reservations.holders(GPU0) == {"b": 80 * GIB}


def test_what_is_kept_free_and_what_others_use_is_not_promised() -> None:
    reservations = two_gpus({GPU0: 2 * GIB})
    reservations.update({GPU0: 80 * GIB}, {GPU0: 10 * GIB})

    assert reservations.available(GPU0) == 68 * GIB
    with pytest.raises(NoCapacity) as raised:
        reservations.reserve("a", [GPU0], 69 * GIB)
    assert "10.0 GiB are used by processes that are not rbee's" in raised.value.details
    assert "2.0 GiB are kept free by the hive's configuration" in raised.value.details


def test_nothing_is_promised_on_a_device_that_is_gone() -> None:
    reservations = two_gpus()
    reservations.update({GPU1: 80 * GIB})

    with pytest.raises(NoCapacity, match="cannot be used now"):
        reservations.reserve("a", [GPU0], 1)


def test_a_new_promise_to_the_same_worker_replaces_its_old_one_or_leaves_it() -> None:
    reservations = two_gpus()
    reservations.reserve("a", [GPU0], 50 * GIB)
    reservations.reserve("a", [GPU0], 60 * GIB)

    with pytest.raises(NoCapacity):
        reservations.reserve("a", [GPU0], 81 * GIB)

    assert reservations.of("a") == 60 * GIB


def test_an_adopted_workers_memory_is_taken_in_even_where_there_is_too_little() -> None:
    reservations = two_gpus()
    reservations.reserve("a", [GPU0], 50 * GIB)

    reservations.restore("adopted", [GPU0], 40 * GIB)

    assert reservations.available(GPU0) == 0
    assert reservations.of("adopted") == 40 * GIB


DEVICES: list[DeviceKey] = [GPU0, GPU1, CPU]
TOTALS: dict[DeviceKey, int] = {GPU0: 1000, GPU1: 700, CPU: 300}
KEPT_FREE: dict[DeviceKey, int] = {GPU0: 100, CPU: 50}


class Spawns(RuleBasedStateMachine):
    """Spawns, stops and other processes' use in any interleaving, beside a plain model of what is held."""

    def __init__(self) -> None:
        super().__init__()
        self.reservations = Reservations(KEPT_FREE)
        self.reservations.update(TOTALS)
        self.foreign: dict[DeviceKey, int] = {}
        self.held: dict[str, tuple[set[DeviceKey], int]] = {}

    @rule(
        worker=st.sampled_from("abcdef"),
        devices=st.sets(st.sampled_from(DEVICES), min_size=1),
        size=st.integers(0, 1200),
    )
    def reserve(self, worker: str, devices: set[DeviceKey], size: int) -> None:
        others = {key: value for key, value in self.held.items() if key != worker}
        fits = all(
            sum(each for held, each in others.values() if device in held)
            + size
            + KEPT_FREE.get(device, 0)
            + self.foreign.get(device, 0)
            <= TOTALS[device]
            for device in devices
        )
        try:
            self.reservations.reserve(worker, sorted(devices), size)
        except NoCapacity as exc:
            assert (exc.code, fits and size > 0) == ("no_device_memory", False)  # noqa: PT017
        else:
            assert size == 0 or fits
            self.held[worker] = (devices, size)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.held)))
        self.reservations.release(worker)
        del self.held[worker]

    @rule(device=st.sampled_from(DEVICES), size=st.integers(0, 500))
    def others_use(self, device: DeviceKey, size: int) -> None:
        self.foreign[device] = size
        self.reservations.update(TOTALS, self.foreign)

    @invariant()
    def never_more_than_there_is(self) -> None:
        for device, total in TOTALS.items():
            assert self.reservations.reserved(device) <= total - KEPT_FREE.get(device, 0)
            assert self.reservations.reserved(device) == sum(
                size for devices, size in self.held.values() if device in devices
            )

    @invariant()
    def everybody_has_what_was_promised(self) -> None:
        for worker in "abcdef":
            expected = self.held[worker][1] if worker in self.held else None
            assert self.reservations.of(worker) == expected


TestSpawns = Spawns.TestCase
TestSpawns.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), max_size=40))
def test_spawns_one_after_another_fill_a_device_and_no_more(sizes: list[int]) -> None:
    reservations = Reservations({GPU0: 10})
    reservations.update({GPU0: 500})
    for number, size in enumerate(sizes):
        if size <= reservations.available(GPU0):
            reservations.reserve(str(number), [GPU0], size)
        else:
            with pytest.raises(NoCapacity):
                reservations.reserve(str(number), [GPU0], size)

    assert reservations.reserved(GPU0) <= 490
