"""A self-contained HTML page: data, styles and scripts inside, nothing fetched, nothing evaluated.

Templates extend `page.html.j2`, which defines the blocks `top` (beside the theme switch) and
`body`. Scripts find the page's data with `page.data(NAME)`; see `static/page.js`.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenratio.data.display import visible
from tokenratio.errors import TokenRatioError, reported_as
from tokenratio.evaluation.results import without_nan
from tokenratio.run_folder import package_version, replace_text

if TYPE_CHECKING:
    from jinja2 import Environment

# How a page of ours begins; another file is not replaced.
_MARK = b'<meta name="generator" content="tokenratio'
# Larger ones are slow to open and are refused by mail and issue trackers.
LARGEST_PAGE = 8_000_000
# Half a surrogate pair, which no encoding has; escapes in JSON can hold one.
_HALF_PAIR = re.compile("[\ud800-\udfff]")
# Characters that could end the element, begin a comment, or end a line of a script.
_ESCAPED = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def render_page(
    template: str,
    *,
    title: str,
    data: Mapping[str, Any],
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    libraries: Sequence[str] = (),
    live: bool = False,
    **content: Any,
) -> str:
    """The page as HTML; every string of `title`, `data` and `content` is escaped.

    Args:
        template: in `templates`, extending `page.html.j2`.
        title: of the document.
        data: JSON values by name, for the scripts; nan and infinity become null.
        styles, scripts: names in `static`, besides `page.css` and `page.js`.
        libraries: sources of scripts to run before them.
        live: let the page's scripts ask the server that it came from.
        content: what the template shows.
    """
    from markupsafe import Markup

    css = [static_text(name) for name in ("page.css", *styles)]
    first, last = static_text("page.js"), [*libraries, *map(static_text, scripts)]
    for script in (first, *last):
        if "</script" in script.lower() or "<!--" in script:
            raise ValueError("a script of the page holds </script or <!--, which would end it")
    return render_part(
        template,
        title=title,
        version=package_version("tokenratio"),
        policy=_security_policy(css, [first, *last], live=live),
        styles=[Markup(style) for style in css],
        first_script=Markup(first),
        scripts=[Markup(script) for script in last],
        data={name: Markup(embedded_json(value)) for name, value in data.items()},
        live=live,
        **content,
    )


def render_part(template: str, **content: Any) -> str:
    """A template alone, as HTML: a part of a page that is shown already."""
    text = _environment().get_template(template).render(**content)
    return _HALF_PAIR.sub("\N{REPLACEMENT CHARACTER}", text)


def write_page(path: Path, page: str) -> None:
    """Write a page that can be opened from disk.

    Raises:
        TokenRatioError: it is larger than `LARGEST_PAGE` bytes, would replace a file that is no
            page of ours, or cannot be written.
    """
    require_replaceable(path, _MARK)
    size = len(page.encode())
    if size > LARGEST_PAGE:
        raise TokenRatioError(
            f"{path}: the page would have {size / 1e6:.1f} MB, more than "
            f"{LARGEST_PAGE / 1e6:.0f} MB: show less in one page"
        )
    with reported_as(f"cannot write {path}", OSError):
        replace_text(path, page)


def require_replaceable(path: Path, mark: bytes) -> None:
    """Refuse to replace a folder, a device, or a file without `mark` near its beginning.

    An empty file, as `mktemp` makes one, is replaced.
    """
    if path.is_dir():
        raise TokenRatioError(f"{path} is a folder: give a file")
    if path.exists() and not path.is_file():
        raise TokenRatioError(f"{path} is no regular file: choose another --output")
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if mark not in file.read(4096):
                raise TokenRatioError(f"{path} exists and is no report: choose another --output")


def embedded_json(value: Any) -> str:
    r"""JSON that can stand inside a `<script>` element, and in any encoding.

    >>> print(embedded_json({"a": "</script>\u2028"}))
    {"a":"\u003c/script\u003e\u2028"}
    """

    def text(value: Any, *, ascii_only: bool) -> str:
        return json.dumps(
            value, ensure_ascii=ascii_only, allow_nan=False, separators=(",", ":")
        ).translate(_ESCAPED)

    try:
        found = text(value, ascii_only=False)
    except ValueError:
        value = without_nan(value)
        found = text(value, ascii_only=False)
    try:
        found.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        found = text(value, ascii_only=True)
    return found


@cache
def static_text(name: str) -> str:
    """A file of `static`."""
    return (files(__package__) / "static" / name).read_text(encoding="utf-8")


def _shown(value: Any) -> Any:
    """What the template shows of a value; markup, such as our own scripts, stays as it is."""
    return value if not isinstance(value, str) or hasattr(value, "__html__") else visible(value)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _security_policy(styles: Sequence[str], scripts: Sequence[str], *, live: bool) -> str:
    """The Content-Security-Policy: only what the page holds, by its SHA-256, and inline images.

    The style of the empty text is plotly.js's element, whose rules are added by script.
    """
    rules = {
        "default-src": ["'none'"],
        "script-src": [_source(script) for script in scripts],
        "style-src": [_source(style) for style in ("", *styles)],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }
    if live:
        rules["connect-src"] = ["'self'"]
    return "; ".join(f"{name} {' '.join(sources)}" for name, sources in rules.items())


@cache
def _source(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
