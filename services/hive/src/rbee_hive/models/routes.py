"""Model files for other hives: what a model consists of, and each file by range.

`GET /v1/models/{model}/manifest` and `GET /v1/models/{model}/files/{path}`. Only files that the catalogue
lists are served, so a path never reaches the disk.
"""

import os
from collections.abc import Iterator

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Route

from rbee_contracts.errors import NotFound
from rbee_hive.models.catalogue import Models
from rbee_hive.models.names import is_model_id
from rbee_job_server.errors import json_response


class _ModelFileResponse(FileResponse):
    chunk_size = 2**20
    max_ranges = 1


def model_routes(models: Models) -> list[BaseRoute]:
    """Give the routes of one hive's models."""

    async def manifest(request: Request) -> Response:
        return json_response(await models.manifest(request.path_params["model"]))

    async def file(request: Request) -> Response:
        return await anyio.to_thread.run_sync(_open, models, request.path_params["rest"])

    return [
        Route("/v1/models/{model:path}/manifest", manifest, methods=["GET"]),
        Route("/v1/models/{rest:path}", file, methods=["GET"]),
    ]


def _open(models: Models, rest: str) -> Response:
    """Find a file. An id may have a slash, so `a/files/b` is looked up in every way it can be read."""
    for model, path in readings(rest):
        entry = models.lookup(model)
        if entry is None:
            continue
        for listed in entry.files:
            if listed.path == path:
                place = entry.file_path(listed)
                try:
                    seen = os.stat(place)
                except OSError:
                    break
                tag = models.sums(entry).get(path)
                headers = {"ETag": f'"{tag}"'} if tag is not None else None
                return _ModelFileResponse(
                    place, headers=headers, media_type="application/octet-stream", stat_result=seen
                )
    raise NotFound(
        "This hive has no such file of a model. Its models: model_list; a model's files: model_get.",
        code="file_not_found",
    )


def readings(rest: str) -> Iterator[tuple[str, str]]:
    """Give every way in which `rest` is `{model}/files/{path}`. Pure."""
    parts = rest.split("/")
    for length in (1, 2):
        if len(parts) > length + 1 and parts[length] == "files":
            model = "/".join(parts[:length])
            if is_model_id(model):
                yield model, "/".join(parts[length + 1 :])
