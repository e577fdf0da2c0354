"""The OpenAPI document of the queen's routes, and a page that shows it."""

from functools import cache

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from rbee_job_server.errors import json_response
from rbee_queen.openapi.document import build_document
from rbee_queen.openapi.page import render_page

__all__ = ["build_document", "docs_routes", "render_page"]


def docs_routes(version: str) -> list[Route]:
    """Give the routes of the document and of its page. Both are made once, for who first asks."""
    document = cache(lambda: build_document(version))
    page = cache(lambda: render_page(document()))

    async def openapi(_: Request) -> Response:
        return json_response(document())

    async def docs(_: Request) -> Response:
        return HTMLResponse(page())

    return [Route("/openapi.json", openapi), Route("/docs", docs)]
