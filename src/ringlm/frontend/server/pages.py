"""The pages for people: / and /docs, whole in themselves, without scripts and without anything from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

from starlette.responses import HTMLResponse

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.1rem; margin: 0; display: inline; } h3 { margin-bottom: 0.3rem; }
code, pre { font: 0.9em/1.45 ui-monospace, monospace; }
pre { background: var(--soft); padding: 0.7rem 1rem; border-radius: 6px; overflow-x: auto; }
details { border: 1px solid var(--line); border-radius: 6px; padding: 0.5rem 1rem; margin: 0.5rem 0; }
summary { cursor: pointer; } summary p { display: inline; margin-left: 0.5rem; opacity: 0.75; }
table { border-collapse: collapse; width: 100%; } td:first-child { white-space: nowrap; }
td { border-top: 1px solid var(--line); padding: 0.3rem 0.8rem 0.3rem 0; vertical-align: top; overflow-wrap: anywhere; }
"""
_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}


def front(model: str) -> HTMLResponse:
    """The first page."""
    return _page(
        "ringlm",
        f"<h1>ringlm</h1><p>This server answers for <code>{escape(model)}</code>, with OpenAI's API below "
        f"<code>/v1</code>.</p><p><a href='docs'>The endpoints</a> · <a href='v1/ring'>the ring</a> · "
        f"<a href='openapi.json'>OpenAPI</a></p>",
    )


def docs(document: dict[str, Any]) -> HTMLResponse:
    """All endpoints and their fields, as the OpenAPI document says them."""
    schemas = document["components"]["schemas"]
    parts = [
        "<h1>ringlm</h1><p>Clients of OpenAI's API work with the base URL of this server and <code>/v1</code>. "
        "<a href='openapi.json'>The same as OpenAPI</a>.</p>"
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            head = f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}</p>"
            body = "".join(_body(title, kind) for title, kind in _contents(operation))
            parts.append(f"<details><summary>{head}</summary>{body}</details>")
    parts.append("<h3>Types</h3>")
    parts += [_type(name, schema) for name, schema in sorted(schemas.items())]
    return _page("ringlm: the endpoints", "".join(parts))


def _contents(operation: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What an operation takes and gives, in words, with its schema."""
    found = []
    if "requestBody" in operation:
        found.append(("Takes", operation["requestBody"]["content"]["application/json"]["schema"]))
    for media, content in operation["responses"]["200"]["content"].items():
        found.append(("Streams" if media == "text/event-stream" else "Gives", content["schema"]))
    return found


def _body(title: str, schema: dict[str, Any]) -> str:
    return f"<p>{title} {_kind(schema)}.</p>"


def _type(name: str, schema: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code>{' *' if field in schema.get('required', ()) else ''}</td>"
        f"<td>{_kind(each)}</td><td>{escape(each.get('description', ''))}</td></tr>"
        for field, each in schema.get("properties", {}).items()
    )
    about = escape(schema.get("description", ""))
    head = f"<summary><h2><code>{name}</code></h2></summary>"
    return f"<details id='{name}'>{head}<p>{about}</p><table>{rows}</table></details>"


def _kind(schema: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"<a href='#{name}'><code>{name}</code></a>"
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"<code>{escape(str(each))}</code>" for each in schema["enum"])
    kind = escape(str(schema.get("type", "anything")))
    if kind == "array" and "items" in schema:
        return f"list of {_kind(schema['items'])}"
    limits = [
        f"{sign} {schema[key]}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    return f"{kind} {', '.join(limits)}" if limits else kind


def _page(title: str, body: str) -> HTMLResponse:
    head = (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<link rel='icon' href='data:,'>"
        f"<title>{title}</title><style>{_STYLE}</style>"
    )
    return HTMLResponse(head + body, headers=_HEADERS)
