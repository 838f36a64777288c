"""A curated dashboard for a stale run: the few panels that matter, of the hundred metrics that verl logs.

TensorBoard shows it in its "Custom Scalars" tab, from an event file beside the run's own. docs/metrics.md lists the
same panels for wandb.
"""

# Generated protobuf modules have no types.
# pyright: reportAttributeAccessIssue=false

from pathlib import Path

from verl_m2po.report.reading.runs import LAYOUT_SUFFIX

# Group to chart title to regular expressions of tags; TensorBoard draws all tags that match in one chart.
LAYOUT: dict[str, dict[str, list[str]]] = {
    "1 result": {
        "validation accuracy": [r"^val-core/.+/mean@\d+$"],
        "training score": [r"^critic/score/mean$"],
    },
    "2 trust region": {
        "tokens masked or clipped (share)": [r"^actor/m2po/masked_fraction$", r"^actor/pg_clipfrac$"],
        "second moment before and after the mask": [r"^actor/m2po/second_moment_(before|after)$"],
        "threshold on |log ratio|": [r"^actor/m2po/threshold_log_ratio$"],
        "trust-region tokens (share)": [r"^actor/m2po/trust_region_fraction$"],
        "trust-region tokens masked (share)": [r"^actor/m2po/masked_fraction_trust_region$"],
        "effective sample size (share)": [r"^actor/m2po/effective_sample_size$"],
    },
    "3 staleness": {
        "age of the data (optimizer updates)": [r"^staleness/age_updates_(min|mean|max)$"],
        "age of the data (weight versions)": [r"^training/off_policy/trajectory_staleness/(min|mean|max)$"],
        "versions within one trajectory": [r"^training/off_policy/trajectory_spans/(mean|max)$"],
        "buffer (prompt groups)": [r"^staleness/(depth|waiting|in_flight)$"],
        "admitted and evicted (prompt groups)": [r"^staleness/(admitted|evicted)$"],
        "tokens masked for their age": [r"^staleness/over_age_tokens$"],
    },
    "4 health": {
        "entropy (nats per token)": [r"^actor/(entropy|m2po/entropy_(kept|masked))$"],
        "gradient norm": [r"^actor/grad_norm$"],
        "KL, behaviour to current (nats)": [r"^actor/(ppo_kl|m2po/kl)$"],
        "response length (tokens)": [r"^response_length/mean$"],
        "responses of full length (share)": [r"^response_length/clip_ratio$"],
        "rollout to trainer mismatch (probability)": [r"^training/rollout_probs_diff_(mean|max)$"],
    },
    "5 speed": {
        "tokens per second and device": [r"^perf/throughput$"],
        "idle (s per step)": [r"^staleness/(trainer|generator)_idle_s$"],
        "seconds per step": [r"^timing_s/(step|gen|old_log_prob|update_actor|update_weights|testing)$"],
    },
}


def write_tensorboard_layout(folder: Path) -> Path:
    """Add the layout to a TensorBoard folder, as one more event file; returns that file.

    Args:
        folder: The run's TensorBoard folder ($TENSORBOARD_DIR, or tensorboard_log/<project>/<experiment>), or any
            folder above it. It is made if it is not there.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.custom_scalar import layout_pb2, metadata
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        from tensorboard.util.tensor_util import make_tensor_proto
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the TensorBoard layout needs tensorboard: pip install tensorboard") from error

    categories = [
        layout_pb2.Category(
            title=group,
            chart=[
                layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=tags))
                for title, tags in charts.items()
            ],
        )
        for group, charts in LAYOUT.items()
    ]
    # tensorboard's own `custom_scalar.summary.pb` needs TensorFlow for these three lines.
    layout = layout_pb2.Layout(category=categories).SerializeToString()
    summary = Summary()
    summary.value.add(
        tag=metadata.CONFIG_SUMMARY_TAG,
        tensor=make_tensor_proto(layout),
        metadata=metadata.create_summary_metadata(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    writer = EventFileWriter(str(folder), filename_suffix=LAYOUT_SUFFIX)
    writer.add_event(Event(summary=summary))
    writer.close()
    return (set(folder.iterdir()) - before).pop()
