"""The OpenAPI document as one page of plain HTML: no script, and nothing from elsewhere. Pure."""

import re
from collections.abc import Iterator
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
code, .path { font-family: ui-monospace, monospace; }
section { border-top: 1px solid #8886; margin: 1.5rem 0; }
table { border-collapse: collapse; width: 100%; }
td, th { border-bottom: 1px solid #8883; padding: .25rem .5rem; text-align: left; vertical-align: top; }
.method { display: inline-block; font-weight: bold; min-width: 4.5rem; text-transform: uppercase; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd; } a { color: #8bf; } }
"""


def render_page(document: dict[str, Any]) -> str:
    """Write the page."""
    return "\n".join(_lines(document))


def _lines(document: dict[str, Any]) -> Iterator[str]:
    info = document["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield f"<title>{title}</title><style>{_STYLE}</style></head><body>"
    yield f"<h1>{title}</h1><p>{_text(info['description'])}</p>"
    yield '<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>'
    by_tag: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            by_tag.setdefault(operation["tags"][0], []).append((path, method, operation))
    for tag, operations in by_tag.items():
        yield f"<h2>{escape(tag)}</h2>"
        for path, method, operation in operations:
            yield from _operation(path, method, operation)
    yield "<h2>Shapes</h2>"
    for name, schema in sorted(document["components"]["schemas"].items()):
        yield from _shape(name, schema)
    yield "</body></html>"


def _operation(path: str, method: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f'<section id="{escape(operation["operationId"])}">'
    yield f'<h3><span class="method">{method}</span> <span class="path">{escape(path)}</span></h3>'
    yield f"<p>{_text(operation['summary'])}. {_text(operation.get('description', ''))}</p>"
    yield "<table>"
    for parameter in operation.get("parameters", ()):
        where = f"{escape(parameter['name'])} <small>in {parameter['in']}</small>"
        yield f"<tr><td><code>{where}</code></td><td>{_text(parameter['description'])}</td></tr>"
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<tr><td>body, {escape(media_type)}</td><td>{_kind(content.get('schema'))}</td></tr>"
    for status, reply in operation["responses"].items():
        kinds = ", ".join(_kind(content.get("schema")) for content in reply.get("content", {}).values())
        told = f"{_text(reply['description'])} {kinds}"
        yield f"<tr><td>{status}</td><td>{told}</td></tr>"
    yield "</table></section>"


def _shape(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f'<section id="{escape(name)}"><h3>{escape(name)}</h3>'
    yield f"<p>{_text(schema.get('description', ''))}</p><table>"
    required = schema.get("required", ())
    for field, kind in schema.get("properties", {}).items():
        needed = "" if field in required else " <small>may be missing</small>"
        yield f"<tr><td><code>{escape(field)}</code>{needed}</td><td>{_kind(kind)}</td></tr>"
    yield "</table></section>"


def _kind(schema: dict[str, Any] | None) -> str:
    """Name a schema's type in a few words."""
    if not schema:
        return ""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_kind(part) or "any" for part in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    if "const" in schema:
        return f"<code>{escape(str(schema['const']))}</code>"
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items')) or 'any'}"
    return escape(str(schema.get("type", "any")))


def _text(text: str) -> str:
    """What stands in backticks is code, as in Markdown."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
