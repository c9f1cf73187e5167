"""Where the token-credit viewer writes: of files that exist, only its own are replaced."""

import json
from pathlib import Path

from tokenratio.errors import TokenRatioError, reported_as
from tokenratio.report.page import require_replaceable

# How the title of its page begins, and the keys of a line of its figures.
PAGE_TITLE = "Token credit of"
FIGURES = {
    *("pair", "origin", "policy", "prompt", "prompt_cut", "num_shared", "divergence"),
    *("beta", "rewards", "chosen", "rejected", "methods"),
}


def require_places(page: Path | None, figures: Path | None, *, data: str | None) -> None:
    """Refuse places that cannot be written to, before any model runs.

    Args:
        page, figures: the page and the JSON lines to write; None for none.
        data: the pairs that are read.
    Raises:
        TokenRatioError: a place is that of the pairs, is another file's, or is given twice.
    """
    places = [path for path in (page, figures) if path is not None]
    if len({path.resolve() for path in places}) < len(places):
        raise TokenRatioError(f"{figures} is both --output and --jsonl: choose another for one")
    for path in places:
        if data is not None and path.resolve() == Path(data).resolve():
            raise TokenRatioError(f"{path} is the file of the pairs: choose another")
    if page is not None:
        require_own_page(page)
    if figures is not None:
        require_own_figures(figures)


def require_own_page(path: Path) -> None:
    """Refuse to replace what is no page of the viewer."""
    require_replaceable(path, f"<title>{PAGE_TITLE} ".encode())


def require_own_figures(path: Path) -> None:
    """Refuse to replace what does not begin with a line of figures; an empty file holds nothing."""
    if not path.exists():
        return
    if path.is_file():
        with reported_as(f"cannot read {path}", OSError), path.open("rb") as file:
            line = file.readline()
        try:
            found = json.loads(line) if line else dict.fromkeys(FIGURES)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and found.keys() == FIGURES:
            return
    raise TokenRatioError(
        f"{path} exists and holds no figures of `tokenratio inspect`: choose another --jsonl"
    )
