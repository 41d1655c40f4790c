"""The OpenAPI document as a page that can be read: plain HTML, made once, without a script."""

import re
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any, Final, TypeAlias

_Object: TypeAlias = dict[str, Any]

_CODES: Final = "Error codes"
_HEADERS: Final = "Headers of answers"
_OBJECTS: Final = "Objects"
_PROBLEM: Final = "application/problem+json"
_PAGE: Final = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="stylesheet" href="{root}/web/docs.css">
</head>
<body>
<header>
<h1>{title}</h1>
{intro}
<p>Version {version}. <a href="{root}/openapi.json">openapi.json</a> has the same for programs.</p>
</header>
<nav aria-label="Contents">
{contents}
</nav>
<main>
{sections}
</main>
</body>
</html>
"""


def page(document: _Object) -> bytes:
    """Return the page of an OpenAPI document, which `openapi.DOCUMENT` shows what it may use."""
    return _Page(document).html().encode()


class _Page:
    def __init__(self, document: _Object) -> None:
        self._document = document

    def html(self) -> str:
        info = self._document["info"]
        sections = [
            *map(self._tag, self._document["tags"]),
            self._codes(),
            self._headers(),
            self._schemas(),
        ]
        return _PAGE.format(
            title=f"The API of {escape(info['title'])}",
            root=self._document["servers"][0]["url"].rstrip("/"),
            version=escape(info["version"]),
            intro=_paragraphs(info["description"]),
            contents=self._contents(),
            sections="\n".join(sections),
        )

    def _contents(self) -> str:
        groups = []
        for tag in self._document["tags"]:
            links = [
                _link(operation["operationId"], f"{method.upper()} {path}")
                for method, path, operation in self._operations(tag["name"])
            ]
            groups.append(_link(tag["name"], tag["name"]) + _list(links))
        return _list([*groups, *(_link(title, title) for title in (_CODES, _HEADERS, _OBJECTS))])

    def _operations(self, tag: str) -> Iterator[tuple[str, str, _Object]]:
        """Yield method, path and operation of those with this tag; HEAD goes without saying."""
        for path, item in self._document["paths"].items():
            for method, operation in item.items():
                if method not in {"parameters", "head"} and tag in operation["tags"]:
                    yield method, path, operation

    def _tag(self, tag: _Object) -> str:
        operations = [self._operation(*found) for found in self._operations(tag["name"])]
        return _section(tag["name"], _paragraphs(tag["description"]), *operations)

    def _operation(self, method: str, path: str, operation: _Object) -> str:
        shared = self._document["paths"][path]["parameters"]
        parameters = [self._resolved(each) for each in (*operation["parameters"], *shared)]
        body = operation.get("requestBody", {"content": {}})["content"]
        (sample,) = operation["x-codeSamples"]
        parts = [
            f'<article id="{_anchor(operation["operationId"])}">',
            f"<h3><code>{method.upper()} {escape(path)}</code> {escape(operation['summary'])}</h3>",
            _paragraphs(operation["description"]),
            f"<pre><code>{escape(sample['source'])}</code></pre>",
            _table("Parameters", ("name", "in", "type", "what it is"), map(_parameter, parameters)),
            *(self._body(kind, each["schema"]) for kind, each in body.items()),
            self._answers(operation["responses"]),
            "</article>",
        ]
        return "\n".join(parts)

    def _body(self, kind: str, schema: _Object) -> str:
        schema = self._resolved(schema)
        intro = f"<h4>Body: <code>{escape(kind)}</code></h4>{_paragraphs(schema['description'])}"
        return intro + self._members(schema, "The body's members")

    def _members(self, schema: _Object, caption: str) -> str:
        """Return a table of an object's members or an array's elements; of others, nothing."""
        members = schema.get("properties") or {
            element["title"]: element for element in schema.get("prefixItems", ())
        }
        required = schema.get("required", ()) if "anyOf" in schema else ()
        rows = (
            (_code(name), self._type(member) + _required(name in required), _text(_told(member)))
            for name, member in members.items()
        )
        return _table(caption, ("name", "type", "what it is"), rows) if members else ""

    def _answers(self, answers: _Object) -> str:
        """Return the table of the answers, and that of the problems."""
        rows: dict[bool, list[tuple[str, ...]]] = {False: [], True: []}
        for status, answer in answers.items():
            content = answer.get("content", {})
            is_problem = _PROBLEM in content
            if is_problem:
                codes = content[_PROBLEM]["schema"]["allOf"][1]["properties"]["code"]["enum"]
                told = ", ".join(_link(f"code {code}", code) for code in codes)
            else:
                told = _text(answer["description"]) + "".join(map(self._content, content.items()))
            # That every answer carries the id is said once, at the top.
            names = [name for name in answer["headers"] if name != "X-Request-Id"]
            headers = ", ".join(_link(f"header {name}", name) for name in names)
            rows[is_problem].append((status, told, headers))
        return (
            _table("Answers", ("status", "what it is", "headers"), rows[False])
            + "\n"
            + _table("Problems", ("status", "code", "headers"), rows[True])
        )

    def _content(self, content: tuple[str, _Object]) -> str:
        kind, described = content
        return f"<br>{_code(kind)} {self._type(described.get('schema', {}))}"

    def _codes(self) -> str:
        codes = self._document["components"]["schemas"]["Problem"]["properties"]["code"]["oneOf"]
        rows = (
            (_target(f"code {each['const']}", each["const"]), _text(each["description"]))
            for each in codes
        )
        return _section(_CODES, _table(_CODES, ("code", "status and when"), rows))

    def _headers(self) -> str:
        rows = (
            (
                _target(f"header {name}", name),
                _code(header["example"]),
                _text(header["description"]),
            )
            for name, header in self._document["components"]["headers"].items()
        )
        return _section(_HEADERS, _table(_HEADERS, ("name", "example", "what it is"), rows))

    def _schemas(self) -> str:
        parts = [
            f'<article id="{_anchor(f"object {name}")}"><h3><code>{escape(name)}</code></h3>\n'
            f"{_paragraphs(schema['description'])}\n{self._members(schema, name)}</article>"
            for name, schema in self._document["components"]["schemas"].items()
        ]
        return _section(_OBJECTS, *parts)

    def _resolved(self, schema: _Object) -> _Object:
        if "$ref" not in schema:
            return schema
        _, _, kind, name = schema["$ref"].split("/")
        found: _Object = self._document["components"][kind][name]
        return found

    def _type(self, schema: _Object) -> str:
        """Return what a value of the schema is, as HTML."""
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return _link(f"object {name}", name)
        if "allOf" in schema:
            return self._type(schema["allOf"][0])
        if "anyOf" in schema and "type" not in schema:
            return " or ".join(map(self._type, schema["anyOf"]))
        if schema.get("type") == "array" and "prefixItems" not in schema:
            return f"array of {self._type(schema['items'])}"
        return escape(_scalar(schema))


def _scalar(schema: _Object) -> str:
    if "const" in schema:
        return f'"{schema["const"]}"'
    if schema.get("format") == "binary":
        return "file"
    words = [schema.get("format") or schema.get("type") or ""]
    if "maxLength" in schema:
        words.append(f"of {schema.get('minLength', 0)} to {schema['maxLength']} characters")
    if "maximum" in schema:
        words.append(f"from {schema['minimum']} to {schema['maximum']}")
    if "default" in schema:
        words.append(f"(default {schema['default']})")
    return " ".join(words)


def _told(schema: _Object) -> str:
    """Return the description of a schema, or of what it is unless it is null."""
    alternatives = (schema, *schema.get("anyOf", ()))
    return next((each["description"] for each in alternatives if "description" in each), "")


def _required(is_required: bool) -> str:  # noqa: FBT001 - it is what the name asks
    return ", required" if is_required else ""


def _parameter(parameter: _Object) -> tuple[str, ...]:
    kind = _scalar(parameter["schema"])
    return (
        _code(parameter["name"]),
        escape(parameter["in"]),
        escape(kind) + _required(parameter.get("required", False)),
        _text(parameter["description"]),
    )


def _table(caption: str, heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table; `rows` are HTML, the first of each what the row is about."""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    lines = (
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    caption_and_head = f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
    body = "\n".join(lines)
    # On a phone it is the table that is scrolled, also with the keyboard, and not the page.
    return (
        f'<div class="table" tabindex="0" role="group" aria-label="{escape(caption)}">'
        f"<table>{caption_and_head}\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _section(title: str, *parts: str) -> str:
    begin = f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2>'
    return "\n".join([begin, *parts, "</section>"])


def _target(anchor: str, text: str) -> str:
    return f'<code id="{_anchor(anchor)}">{escape(text)}</code>'


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _link(anchor: str, text: str) -> str:
    return f'<a href="#{_anchor(anchor)}">{escape(text)}</a>'


def _anchor(text: str) -> str:
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{_text(part)}</p>" for part in text.split("\n\n"))


def _text(text: str) -> str:
    """Return Markdown, of which nothing but `code` is known, as HTML."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text, quote=False))


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"
