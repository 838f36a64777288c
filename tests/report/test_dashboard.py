import json
import re
from pathlib import Path

import pytest

from verl_m2po.report.drawing.dashboard import LAYOUT, write_tensorboard_layout
from verl_m2po.report.reading import metrics
from verl_m2po.report.reading.runs import find_sources, read_runs

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
SummaryWriter = pytest.importorskip("torch.utils.tensorboard").SummaryWriter


def run_with_layout(folder):
    writer = SummaryWriter(str(folder))
    for step in range(1, 4):
        writer.add_scalar("actor/m2po/masked_fraction", 0.0006, step)
        writer.add_scalar("val-core/openai/gsm8k/acc/mean@8", 0.5, step)
    writer.close()
    return write_tensorboard_layout(folder)


def test_tensorboard_reads_the_layout_back(tmp_path):
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    path = run_with_layout(tmp_path)
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert metadata.CONFIG_SUMMARY_TAG in events.PluginTagToContent(metadata.PLUGIN_NAME)
    (event,) = events.Tensors(metadata.CONFIG_SUMMARY_TAG)
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(LAYOUT)
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert charts == {title: tags for group in LAYOUT.values() for title, tags in group.items()}
    assert path.parent == tmp_path


def test_the_plugin_itself_serves_the_layout(tmp_path):
    """The route that the browser asks, not only the file."""
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.custom_scalar import custom_scalars_plugin

    run_with_layout(tmp_path / "run")
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(tmp_path))
    context = base_plugin.TBContext(logdir=str(tmp_path), multiplexer=multiplexer, data_provider=provider)
    plugin = custom_scalars_plugin.CustomScalarsPlugin(context)
    layout = json.loads(plugin.layout_impl(RequestContext(), ""))
    assert [category["title"] for category in layout["category"]] == list(LAYOUT)


def test_every_pattern_is_valid_and_the_reports_own_metrics_have_a_chart():
    patterns = [re.compile(tag) for charts in LAYOUT.values() for tags in charts.values() for tag in tags]
    shown = [
        metrics.MASKED_FRACTION,
        metrics.CLIP_FRACTION,
        metrics.SECOND_MOMENT_BEFORE,
        metrics.SECOND_MOMENT_AFTER,
        metrics.THROUGHPUT,
        metrics.AGE_UPDATES.format("mean"),
        metrics.AGE_VERSIONS.format("max"),
        "val-core/openai/gsm8k/acc/mean@8",
        "actor/grad_norm",
        "timing_s/gen",
    ]
    for name in shown:
        assert any(pattern.search(name) for pattern in patterns), name


def test_the_layout_is_not_taken_for_an_attempt(tmp_path):
    run_with_layout(tmp_path / "run")
    assert len(find_sources(tmp_path)[0][0].files) == 1
    (run,), problems = read_runs([tmp_path])
    assert len(run.frame) == 3 and problems == []


def test_the_docs_name_every_metric_that_the_report_looks_at():
    text = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    watched = {name for panel in (*metrics.HEALTH, *metrics.BUFFER) for name in panel.metrics[:1]}
    watched |= {metrics.MASKED_FRACTION, metrics.CLIP_FRACTION, metrics.SECOND_MOMENT_BEFORE, metrics.THROUGHPUT}
    assert not [name for name in watched if name not in text and name.rsplit("/", 1)[-1] not in text]
