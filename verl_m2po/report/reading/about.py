"""What a reader of a report must know of its runs beside their results: model, data, learning rate and date."""

from datetime import datetime, timezone

from verl_m2po.report.reading.groups import Group
from verl_m2po.report.reading.settings import lookup

UNKNOWN = "-"
MODEL, DATA = "actor_rollout_ref.model.path", "data.train_files"
LEARNING_RATE = "actor_rollout_ref.actor.optim.lr"


def about(groups: list[Group]) -> list[dict[str, str]]:
    """Column title to text, a row for each group; nothing is known without a config beside the log but the date."""
    return [
        {
            "run": group.label,
            "model": _of_runs(group, MODEL),
            "training data": _of_runs(group, DATA),
            "learning rate": _of_runs(group, LEARNING_RATE),
            "last logged (UTC)": _date(group),
        }
        for group in groups
    ]


def _of_runs(group: Group, key: str) -> str:
    """What the runs of the group have there, each once."""
    texts = dict.fromkeys(_text(lookup(run.settings.config, key)) for run in group.runs)
    return ", ".join(texts)


def _text(value: object) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:g}"
    # A model's id on the hub is two words; of a path the end says what it is.
    return "/".join(str(value).rstrip("/").split("/")[-2:])


def _date(group: Group) -> str:
    times = [run.logged_until_s for run in group.runs if run.logged_until_s is not None]
    if not times:
        return UNKNOWN
    return datetime.fromtimestamp(max(times), tz=timezone.utc).strftime("%Y-%m-%d %H:%M")
