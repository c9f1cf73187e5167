"""Time and memory of a step against vocabulary, length and batch, as one SVG."""

from pathlib import Path
from statistics import median

from cases import CASES
from results import Results

_PANELS = {
    "vocabulary": "vocabulary (tokens)",
    "length": "longer response (tokens)",
    "pairs": "pairs in the batch",
}
# Distinct without colour too: ours is the heavy line, the floor is dotted.
_LINES = {
    "straightforward": ("#b45309", "dash", 1.5),
    "trl_dpo_completions": ("#64748b", "dashdot", 1.5),
    "tbpo_a": ("#0369a1", "solid", 3.0),
    "body": ("#111827", "dot", 1.5),
}


def draw(results: Results, path: Path) -> None:
    """Write `path`, SVG or PNG by its name. Needs plotly, kaleido and Chrome or Chromium."""
    try:
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots
    except ImportError as error:
        print(f"skipped the plot: {error.name} is not installed")
        return
    figure = make_subplots(
        rows=2,
        cols=3,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=0.06,
    )
    for column, (study, title) in enumerate(_PANELS.items(), start=1):
        ticks = sorted({row.x for _, row in results.rows if row.study == study})
        for case, (colour, dash, width) in _LINES.items():
            points = [(x, results.newest(case=case, study=study, x=x)) for x in ticks]
            points = [(x, rows) for x, rows in points if rows]
            seconds = [median(row.seconds for row in rows) for _, rows in points]
            memory = [
                median(row.peak_bytes - row.gradient_bytes for row in rows) / 2**20
                for _, rows in points
            ]
            for line, values in enumerate((seconds, memory), start=1):
                figure.add_trace(
                    go.Scatter(
                        x=[x for x, _ in points],
                        y=values,
                        name=CASES[case].label,
                        legendgroup=case,
                        showlegend=line == column == 1,
                        mode="lines+markers",
                        line={"color": colour, "dash": dash, "width": width},
                        marker={"size": 6},
                    ),
                    row=line,
                    col=column,
                )
        for line in (1, 2):
            figure.update_xaxes(
                type="log",
                tickvals=ticks,
                ticktext=[f"{x // 1000}k" if x >= 8000 else f"{x}" for x in ticks],
                row=line,
                col=column,
            )
        figure.update_xaxes(title_text=title, row=2, col=column)
    # Two labelled lines per decade; plotly's own choice crowds the axis.
    ticks = [float(f"{digit}e{power}") for power in range(-2, 6) for digit in (1, 3)]
    labels = [f"{tick:,g}" for tick in ticks]
    figure.update_yaxes(type="log", tickvals=ticks, ticktext=labels)
    figure.update_yaxes(title_text="seconds per step", row=1, col=1)
    figure.update_yaxes(title_text="peak memory (MiB)", row=2, col=1)
    figure.update_layout(
        width=1100,
        height=700,
        template="plotly_white",
        font={"family": "sans-serif", "size": 13},
        legend={"orientation": "h", "y": 1.08, "x": 0.5, "xanchor": "center"},
        margin={"l": 80, "r": 20, "t": 60, "b": 60},
    )
    try:
        figure.write_image(path)
    except Exception as error:  # kaleido raises its own errors and Chrome's
        raise SystemExit(f"the plot needs kaleido and Chrome or Chromium: {error}") from None
