"""How the figures look: one colour for each method everywhere, safe for colour-blind readers."""

from dataclasses import dataclass
from typing import Any

from verl_m2po.report.reading.groups import Group

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), without its yellow, which is too pale for lines.
ON_POLICY = "#6B6B6B"
COLOURS = {
    "m2po": "#0072B2",
    "m2po_clip": "#56B4E9",
    "grpo": "#D55E00",
    "no_trust_region": "#CC79A7",
    "gspo": "#009E73",
}
OTHERS = ("#E69F00", "#000000", "#8C6D31", "#7B4FA3", "#4C9F9F", "#A63D40")
LINES = ("solid", "dashed", "dashdot", "dotted")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Time per step has more phases than there are well-separated hues; neighbours differ in lightness.
PHASE_COLOURS = {
    "gen": "#0072B2",
    "reward": "#56B4E9",
    "old_log_prob": "#F0C75E",
    "ref": "#8C6D31",
    "values": "#B8A1D9",
    "adv": "#7B4FA3",
    "update_critic": "#CC79A7",
    "update_actor": "#D55E00",
    "update_weights": "#009E73",
    "save_checkpoint": "#4D4D4D",
    "testing": "#A8D8B9",
    "other": "#D9D9D9",
}

RC: dict[Any, Any] = {
    "figure.dpi": 110,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "verl-m2po",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Look:
    """Colour, line style and marker of one group."""

    colour: str
    line: str
    marker: str


def is_reference(group: Group) -> bool:
    """Whether the group is on-policy GRPO, which the others are measured against."""
    return group.staleness_updates == 0 and group.loss == "grpo"


def _lighter(colour: str, rank: int) -> str:
    """Mixed with white: rank 0 as it is, at most 55% white, so that a line stays readable on white."""
    white = min(0.22 * rank, 0.55)
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(channel + (255 - channel) * white):02X}" for channel in channels)


def looks(groups: list[Group]) -> dict[str, Look]:
    """Label to look: the loss gives the colour; within a loss, less stale is lighter, with its own line and marker."""
    unknown = list(dict.fromkeys(g.loss or g.label for g in groups if (g.loss or g.label) not in COLOURS))
    colours = {**COLOURS, **{name: OTHERS[i % len(OTHERS)] for i, name in enumerate(unknown)}}
    seen: dict[str, int] = {}
    chosen = {}
    # Stalest first: the stale run is the subject and gets the solid line.
    for group in sorted(groups, key=lambda g: -(g.staleness_updates or 0)):
        name = "on-policy" if is_reference(group) else group.loss or group.label
        rank = seen[name] = seen.get(name, -1) + 1
        colour = _lighter(ON_POLICY if name == "on-policy" else colours[name], rank)
        chosen[group.label] = Look(colour, LINES[rank % len(LINES)], MARKERS[rank % len(MARKERS)])
    return chosen


def cut(text: str, most: int = 60) -> str:
    """At most that many characters, without the middle: names of runs differ at their ends as often as before."""
    if len(text) <= most:
        return text
    head = (most - 3) // 2
    return f"{text[:head]}...{text[head + 3 - most :]}"


def plain(text: str, most: int = 60) -> str:
    """Text that matplotlib draws as it stands: no math, no control characters, not hidden from the legend."""
    shown = "".join(c if c.isprintable() else "?" for c in text)
    shown = cut(shown, most).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
