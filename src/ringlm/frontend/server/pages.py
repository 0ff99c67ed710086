"""The pages for people: / (files of page/, which speak the API) and /docs. Both need nothing from elsewhere."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

from starlette.responses import HTMLResponse, Response

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h3 { margin: 2rem 0 0; } p { margin: 0.4rem 0; }
code, pre { font: 0.9em/1.45 ui-monospace, monospace; }
pre { background: var(--soft); padding: 0.7rem 1rem; border-radius: 6px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin-top: 0.5rem; } td { width: 35%; }
td:first-child { white-space: nowrap; width: 30%; }
td { border-top: 1px solid var(--line); padding: 0.3rem 1rem 0.3rem 0; vertical-align: top; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  td, td:first-child { display: block; width: auto; border: 0; padding: 0; }
  tr { display: block; border-top: 1px solid var(--line); padding: 0.4rem 0; }
}
"""
_EXAMPLE = """curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
     -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": true}'"""
_PAGE = Path(__file__).parent / "page"
_MEDIA = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_OWN = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",  # a server that was updated shows its own
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}


def front() -> dict[str, Response]:
    """The page at / and what it consists of, by path. The same for everybody: what is served it asks the API."""
    return {
        "/" if file.name == "index.html" else f"/page/{file.name}": Response(
            file.read_bytes(), media_type=_MEDIA[file.suffix], headers=_OWN
        )
        for file in sorted(_PAGE.iterdir())
    }


def docs(document: dict[str, Any]) -> HTMLResponse:
    """All endpoints and their fields, as the OpenAPI document says them."""
    rows = [
        (f"<code>{method.upper()} {escape(path)}</code>", _prose(operation["summary"]), _bodies(operation))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    types = [_type(name, schema) for name, schema in sorted(document["components"]["schemas"].items())]
    return _page(
        "ringlm: the endpoints",
        "<h1>ringlm</h1><p>Clients of OpenAI's API work with the base URL of this server and <code>/v1</code>. "
        "A field with a question mark may be left out. <a href='openapi.json'>The same as OpenAPI</a>."
        f"</p><pre>{escape(_EXAMPLE)}</pre>"
        f"{_table(rows)}{''.join(types)}",
    )


def _bodies(operation: dict[str, Any]) -> str:
    """What an operation takes, gives and streams."""
    parts = []
    if "requestBody" in operation:
        parts.append(f"takes {_kind(operation['requestBody']['content']['application/json']['schema'])}")
    for media, content in operation["responses"]["200"]["content"].items():
        if media == "text/event-stream":
            parts.append(f"streams {_kind(content['schema']['properties']['data']['contentSchema'])}")
        else:
            parts.append(f"gives {_kind(content['schema'])}")
    return "<br>".join(parts)


def _type(name: str, schema: dict[str, Any]) -> str:
    rows = [
        (
            f"<code>{escape(field)}</code>{'' if field in schema.get('required', ()) else '?'}",
            _kind(each),
            _prose(each.get("description", "")),
        )
        for field, each in schema.get("properties", {}).items()
    ]
    return f"<h3 id='{name}'><code>{name}</code></h3><p>{_prose(schema.get('description', ''))}</p>{_table(rows)}"


def _table(rows: list[tuple[str, str, str]]) -> str:
    return "<table>" + "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows) + "</table>"


def _prose(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


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
