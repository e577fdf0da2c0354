"""Which hives a command is about: all that answer, the one that is named, or the one that has the thing."""

import asyncio
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct

from rbee_contracts.errors import Conflict, InvalidRequest, NotFound, RbeeError
from rbee_contracts.nodes import HiveListResult, HiveState, ServiceInfo
from rbee_contracts.operations import HiveList, HiveOperation
from rbee_job_client import JobClient
from rbee_keeper.client import perform
from rbee_keeper.settings import Settings

SILENT: frozenset[HiveState] = frozenset({"unreachable", "lost"})
"""The states in which a hive cannot be asked."""


class Answers(Struct, frozen=True):
    """What the hives said, by hive; and why those that did not say anything did not."""

    results: dict[str, Any]
    silent: dict[str, str]

    def each(self, field: str) -> list[tuple[str, Any]]:
        """Give the items of a result's list, each with its hive."""
        return [(hive, item) for hive, result in self.results.items() for item in getattr(result, field)]


async def own_id(client: JobClient, settings: Settings) -> str:
    """Give the id of the hive that is spoken to directly.

    Raises:
        InvalidRequest: what answers is no hive.
    """
    info: ServiceInfo = await client.get_json("/v1/info", ServiceInfo)
    if info.name != "hive":
        raise InvalidRequest(
            f"{settings.url} is a {info.name}, not a hive. Speak to a queen with --queen.", code="not_a_hive"
        )
    return info.id


async def hive_ids(client: JobClient, settings: Settings) -> tuple[list[str], dict[str, str]]:
    """Give the hives that can be asked now, and why others cannot; a hive asked directly is the one."""
    if settings.is_hive:
        return [await own_id(client, settings)], {}
    known: HiveListResult = await perform(client, HiveList())
    answering = [hive.hive_id for hive in known.hives if hive.state not in SILENT]
    return answering, {hive.hive_id: hive.state for hive in known.hives if hive.state in SILENT}


async def ask_hives(client: JobClient, settings: Settings, operation: HiveOperation) -> Answers:
    """Have each hive execute an operation, or the one it names.

    Raises:
        RbeeError: the hive that was named failed, or every hive did.
    """
    if operation.hive_id is not None:
        return Answers({operation.hive_id: await perform(client, operation)}, {})
    asked, silent = await hive_ids(client, settings)
    operations = [msgspec.structs.replace(operation, hive_id=hive_id) for hive_id in asked]
    answers = await asyncio.gather(*(perform(client, each) for each in operations), return_exceptions=True)
    results: dict[str, Any] = {}
    failed: dict[str, RbeeError] = {}
    for hive_id, answer in zip(asked, answers, strict=True):
        if isinstance(answer, RbeeError):
            failed[hive_id] = answer
        elif isinstance(answer, BaseException):
            raise answer
        else:
            results[hive_id] = answer
    if failed and not results:
        raise next(iter(failed.values()))
    return Answers(results, silent | {hive_id: error.details for hive_id, error in failed.items()})


async def only_hive(client: JobClient, settings: Settings, named: str | None, usage: str) -> str | None:
    """Give the hive that a command about one hive means: the one it names, or the only one.

    Args:
        usage: the command with the name of a hive in it, for the remedy.

    Raises:
        NotFound: there is none.
        Conflict: there are several.
    """
    if named is not None or settings.is_hive:
        return named
    known: HiveListResult = await perform(client, HiveList())
    names = [hive.hive_id for hive in known.hives]
    if not names:
        raise NotFound("There is no hive. Start one: rbee-hive --queen-url URL", code="no_hive")
    if len(names) > 1:
        raise Conflict(
            f"There are {len(names)} hives: {', '.join(names)}. Name one, e.g.: {usage}", code="several_hives"
        )
    return names[0]


def the_one(hives: Iterable[str], what: str, known: str = "") -> str:
    """Choose the hive that has the thing that was named.

    Args:
        hives: those that have it.
        known: a sentence that says what there is instead, for the remedy.

    Raises:
        NotFound: no hive has it.
        Conflict: several have it.
    """
    found = sorted(set(hives))
    if not found:
        raise NotFound(f"No {what}.{known}", code="not_found")
    if len(found) > 1:
        raise Conflict(
            f"The hives {', '.join(found)} each have {what}. Name one: --hive-id {found[0]}",
            code="several_hives",
        )
    return found[0]
