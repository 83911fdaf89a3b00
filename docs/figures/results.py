"""Draw the figure of results on the first page, light and dark: `python docs/figures/results.py`.

It is read from the runs of `experiments/operators`: held-out losses at the end, minus that of the small
model that never grows, paired by seed. The output is reproducible byte for byte.
"""

import json
from pathlib import Path


HERE = Path(__file__).parent
RUNS = HERE.parents[1] / "experiments" / "operators" / "results" / "small.jsonl"
BASE = "fixed-2x32"
# Panel -> (arm, label) by row
PANELS = {
    "Depth, 2 layers to 4": [
        ("stack", "grown at 0.6 by stack"),
        ("fixed-4x32", "large from the start"),
        ("drawn anew", "large, drawn anew at 0.6"),
    ],
    "Width, 32 to 64": [
        ("LEMON", "grown at 0.6 by LEMON"),
        ("fixed-2x64", "large from the start"),
        ("drawn anew", "large, drawn anew at 0.6"),
    ],
}
WORKLOADS = {"Depth, 2 layers to 4": "depth", "Width, 32 to 64": "width"}
# ink, quieter text, lines, seeds and means
THEMES = {
    "light": ("#1c2128", "#5d6671", "#d3d8de", "#1769aa"),
    "dark": ("#d8dee6", "#9aa4af", "#3a424c", "#6cb6f0"),
}
LEFT, RIGHT, ROW, WIDE = 176, 376, 23, 430  # pixels of the axis' ends, a row, and the figure
MOST = 0.55  # nats at the right end


def differences() -> dict[str, dict[str, list[float]]]:
    """The difference of every seed, by panel and arm."""
    losses: dict[tuple[str, str], dict[int, float]] = {}
    for line in RUNS.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        losses.setdefault((run["workload"], run["arm"]), {})[run["seed"]] = run["score"]
    base = losses["fixed", BASE]
    result: dict[str, dict[str, list[float]]] = {}
    for panel, rows in PANELS.items():
        for arm, _ in rows:
            workload = "fixed" if arm.startswith("fixed") else WORKLOADS[panel]
            scores = losses[workload, arm]
            result.setdefault(panel, {})[arm] = [scores[seed] - base[seed] for seed in sorted(base)]
    return result


def place(x: float) -> float:
    """The pixel of a difference."""
    return LEFT + (RIGHT - LEFT) * x / MOST


def drawn(theme: str) -> str:
    """The figure as SVG."""
    ink, quiet, line, blue = THEMES[theme]
    shapes: list[str] = []

    def text(x: float, y: float, words: str, fill: str, more: str = "") -> None:
        shapes.append(f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}"{more}>{words}</text>')

    y = 16
    text(8, y, "Above the loss of the model that stays small, at equal cost", ink)
    for panel, arms in differences().items():
        y += 30
        text(8, y, panel, ink, ' font-weight="bold"')
        top = y
        for arm, label in PANELS[panel]:
            y += ROW
            text(8, y, label, ink)
            values = arms[arm]
            mean = sum(values) / len(values)
            for value in values:
                shapes.append(
                    f'<circle cx="{place(value):.1f}" cy="{y - 4}" r="2.6" fill="{blue}" '
                    'fill-opacity="0.45"/>'
                )
            shapes.append(
                f'<circle cx="{place(mean):.1f}" cy="{y - 4}" r="4.6" fill="none" stroke="{blue}" '
                'stroke-width="1.8"/>'
            )
            text(WIDE - 8, y, f"+{mean:.3f}", ink, ' text-anchor="end"')
        for tick in (0.0, 0.2, 0.4):
            x = place(tick)
            colour = ink if tick == 0 else line
            shapes.insert(
                0,
                f'<line x1="{x:.1f}" y1="{top + 6}" x2="{x:.1f}" y2="{y + 6}" stroke="{colour}"/>',
            )
    for tick in (0.0, 0.2, 0.4):
        text(place(tick), y + 22, f"{tick:g}", quiet, ' text-anchor="middle"')
    y += 40
    text(8, y, "nats a byte; dots are six seeds, rings their means; lower is better", quiet)
    height = y + 12
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDE * 1.4:.0f}" '
        f'height="{height * 1.4:.0f}" viewBox="0 0 {WIDE} {height}" font-size="12.5" '
        'font-family="system-ui, sans-serif">\n'
        f"{body}\n</svg>\n"
    )


if __name__ == "__main__":
    for name in THEMES:
        (HERE / f"results-{name}.svg").write_text(drawn(name), encoding="utf-8")
