"""The report's figures as PNG or SVG, drawn by the Chrome or Chromium that is installed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenratio.errors import TokenRatioError, first_line, reported_as
from tokenratio.report.content import Figure, escaped

_SIZE = {"width": 760, "height": 440, "scale": 2}
_LAYOUT: dict[str, Any] = {
    "paper_bgcolor": "#ffffff",
    "plot_bgcolor": "#ffffff",
    "font": {"family": "sans-serif", "size": 14, "color": "#1a1f24"},
    "margin": {"l": 70, "r": 20, "t": 90, "b": 60},
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
}
_AXIS = {"gridcolor": "#dde1e6", "zerolinecolor": "#dde1e6", "automargin": True}


def write_images(figures: Sequence[Figure], folder: Path, kind: str) -> list[Path]:
    """Write each figure as `NAME.png` or `NAME.svg`; returns the files.

    Raises:
        TokenRatioError: there are no figures, kaleido is not installed or finds no browser, or the
            folder cannot be written to.
    """
    if not figures:
        raise TokenRatioError("there is no figure to draw: the runs have no curves")
    try:
        from kaleido import write_fig_from_object_sync
    except ImportError:
        raise TokenRatioError(
            "images need plotly and kaleido: pip install 'tokenratio[report]'"
        ) from None
    with reported_as(f"cannot write to {folder}", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{figure.name}.{kind}" for figure in figures]
    drawn = [
        {"fig": _for_paper(figure), "path": path, "opts": {**_SIZE, "format": kind}}
        for figure, path in zip(figures, paths, strict=True)
    ]
    try:
        # MathJax would be fetched from the network.
        write_fig_from_object_sync(drawn, cancel_on_error=True, kopts={"mathjax": False})
    except Exception as error:  # kaleido's own errors, and those of the browser
        raise TokenRatioError(
            "images are drawn by Chrome or Chromium, which kaleido could not use: install it "
            f"(`apt-get install chromium`, or `plotly_get_chrome`); {first_line(error)}"
        ) from None
    return paths


def _for_paper(figure: Figure) -> dict[str, Any]:
    content = figure.to_dict()
    title = escaped({"text": figure.title, "x": 0.02})
    layout = {**_LAYOUT, **content["layout"], "title": title}
    for axis in ("xaxis", "yaxis"):
        layout[axis] = {**_AXIS, **layout.get(axis, {})}
    return {"data": content["data"], "layout": layout}
