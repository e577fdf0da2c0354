"""The OpenAPI 3.1 document, from the table of routes and the contracts' structs. Pure."""

from typing import Any

import msgspec

from rbee_contracts.operations import AnyOperation
from rbee_queen.openapi.operations import OPERATIONS, Content, Operation, Parameter, Reply

DESCRIPTION = """Everything a service does for a caller is a job, and every job is an event stream.

The routes of the tag `models` are those of OpenAI's and Anthropic's clients; each request there is a job too.
"""


def build_document(version: str) -> dict[str, Any]:
    """Build the document of a queen of this version."""
    types = _types()
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    by_type = {id(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, by_type)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "rbee queen", "version": version, "description": DESCRIPTION},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }
    portable: dict[str, Any] = _portable(document)
    return portable


def _types() -> list[Any]:
    found: dict[int, Any] = {}
    for operation in OPERATIONS:
        contents: list[Content] = [operation.request, *(reply.content for reply in operation.replies)]
        for content in contents:
            found.update((id(kind), kind) for kind in content.values() if kind is not None)
    assert id(AnyOperation) in found
    return list(found.values())


def _operation(operation: Operation, by_type: dict[int, Any]) -> dict[str, Any]:
    words = operation.path.replace("{", "").replace("}", "").strip("/")
    told: dict[str, Any] = {
        "operationId": f"{operation.method}_{words.replace('/', '_').replace('.', '_')}",
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": {str(reply.status): _reply(reply, by_type) for reply in operation.replies},
        "security": [{}] if operation.is_open else [{"token": []}, {}],
    }
    if operation.description:
        told["description"] = operation.description
    if operation.parameters:
        told["parameters"] = [_parameter(parameter) for parameter in operation.parameters]
    if operation.request:
        told["requestBody"] = {"required": True, "content": _content(operation.request, by_type)}
    return told


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": parameter.place,
        "required": parameter.place == "path",
        "description": parameter.description,
        "schema": dict(parameter.schema),
    }


def _reply(reply: Reply, by_type: dict[int, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"description": reply.description}
    if reply.content:
        told["content"] = _content(reply.content, by_type)
    return told


def _content(content: Content, by_type: dict[int, Any]) -> dict[str, Any]:
    return {
        media_type: {} if kind is None else {"schema": by_type[id(kind)]}
        for media_type, kind in content.items()
    }


def _portable(value: Any) -> Any:
    """Write regular expressions as JSON Schema knows them."""
    match value:
        case dict():
            return {
                key: inner.replace(r"\Z", "$")
                if key == "pattern" and isinstance(inner, str)
                else _portable(inner)
                for key, inner in value.items()
            }
        case list():
            return [_portable(item) for item in value]
        case _:
            return value
