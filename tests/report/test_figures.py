import itertools

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from report_logs import stale_run, write_config, write_log

from verl_m2po.report.build import build
from verl_m2po.report.drawing import figures
from verl_m2po.report.drawing.style import COLOURS, ON_POLICY, looks, plain
from verl_m2po.report.drawing.write import PLOTS
from verl_m2po.report.reading import metrics

pytestmark = pytest.mark.slow

ACC = "val-core/addition/acc/mean@1"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """On-policy, and three losses at s = 256, two seeds each."""
    root = tmp_path_factory.mktemp("study")
    for loss, k in (("grpo", 0), ("grpo", 64), ("no_trust_region", 64), ("m2po", 64)):
        for seed in (1, 2):
            folder = root / f"{loss}-s{4 * k}-seed{seed}"
            write_log(folder / "attempt-1.jsonl", stale_run(loss, k, seed))
            write_config(folder, loss=loss, staleness_updates=4 * k, threshold=0.04, seed=seed)
    return build([root])


def lines(axes) -> dict:
    return {line.get_label(): line for line in axes.lines}


def report_of(tmp_path, rows, name="m2po-s8"):
    write_log(tmp_path / name / "attempt-1.jsonl", rows)
    return build([tmp_path])


def test_every_figure_is_drawn_or_says_why_not(study):
    for plot in PLOTS:
        if plot.name == "buffer":
            with pytest.raises(figures.NothingToDraw, match="staleness/depth"):
                plot.draw(study.groups, study.tasks)
        else:
            assert isinstance(plot.draw(study.groups, study.tasks), Figure)


def test_every_figure_of_nothing_says_so():
    for plot in PLOTS:
        with pytest.raises(figures.NothingToDraw):
            plot.draw([], {})


def test_colours_are_the_methods_own_everywhere(study):
    look = looks(study.groups)
    assert look["grpo, on-policy"].colour == ON_POLICY
    for loss in ("grpo", "no_trust_region", "m2po"):
        assert look[f"{loss}, s=256"].colour == COLOURS[loss]


def test_no_two_groups_of_a_sweep_look_alike(tmp_path):
    for loss in ("grpo", "m2po", "gspo"):
        for s in (0, 16, 64, 256):
            write_log(tmp_path / f"{loss}-s{s}/attempt-1.jsonl", {1: {ACC: 0.5}})
    look = looks(build([tmp_path]).groups)
    assert len(set(look.values())) == len(look) == 12


def test_long_names_that_are_alike_for_long_are_told_apart_in_the_legend(tmp_path):
    start = "qwen2.5-math-7b-instruct-dapo17k-temperature1.0-lr1e-6-bs1024-mb64-n8-"
    for end in ("alpha", "beta"):
        write_log(tmp_path / f"{start}{end}.jsonl", {1: {ACC: 0.5}})
    # The same at both ends, so cut to the same text, but two runs nevertheless.
    for middle in ("one", "two"):
        write_log(tmp_path / f"{'a' * 70}{middle}{'z' * 70}.jsonl", {1: {ACC: 0.5}})
    report = build([tmp_path])
    shown = [text.get_text() for text in figures.accuracy(report.groups, report.tasks).legends[0].get_texts()]
    assert len(shown) == 4 and max(map(len, shown)) == 60
    assert [text.rsplit("-", 1)[-1] for text in shown if "qwen" in text] == ["alpha", "beta"]


def test_accuracy_draws_the_mean_and_the_band_of_the_seeds(study):
    axes = figures.accuracy(study.groups, study.tasks).axes[0]
    drawn = lines(axes)
    assert set(drawn) == {group.label for group in study.groups}
    (task,) = study.tasks.values()
    m2po = next(group for group in study.groups if group.loss == "m2po")
    seeds = np.array([run.series(task[run.name]).to_numpy() for run in m2po.runs])
    np.testing.assert_allclose(drawn["m2po, s=256"].get_ydata(), seeds.mean(axis=0))
    assert to_hex(drawn["m2po, s=256"].get_color()).upper() == COLOURS["m2po"]
    assert len(axes.collections) == len(study.groups)
    band = axes.collections[[g.label for g in study.groups].index(m2po.label)].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(seeds.max()) and band.min() == pytest.approx(seeds.min())
    assert axes.get_ylabel() == "accuracy" and axes.get_xlabel().startswith("trainer step")


def test_the_legend_lies_outside_of_the_axes(study):
    figure = figures.accuracy(study.groups, study.tasks)
    figure.draw_without_rendering()
    assert not figure.legends[0].get_window_extent().overlaps(figure.axes[0].get_window_extent())


def test_tasks_are_never_drawn_in_one_panel(tmp_path):
    write_log(tmp_path / "a.jsonl", {1: {"val-core/gsm8k/acc/mean@1": 0.9}})
    write_log(tmp_path / "b.jsonl", {1: {"val-core/addition/acc/mean@1": 0.1}})
    report = build([tmp_path])
    panels = figures.accuracy(report.groups, report.tasks).axes
    assert [list(lines(axes)) for axes in panels] == [["b"], ["a"]]
    assert "2 tasks" in "\n".join(report.problems)


def test_left_out_fraction_says_masked_or_clipped(study):
    axes = figures.left_out_fraction(study.groups, study.tasks).axes[0]
    assert {"m2po, s=256: masked", "grpo, s=256: clipped"} <= set(lines(axes))
    assert axes.get_yscale() == "symlog"


def test_second_moment_shows_the_threshold_of_the_config(study):
    figure = figures.second_moment(study.groups, study.tasks)
    for axes in figure.axes:
        assert axes.get_yscale() == "log"
        assert set(lines(axes)["threshold 0.04"].get_ydata()) == {0.04}
    assert lines(figure.axes[1])["m2po, s=256"].get_ydata().max() <= 0.04
    assert lines(figure.axes[0])["m2po, s=256"].get_ydata().max() > 0.04


def test_accuracy_by_staleness_is_evenly_spaced_in_octaves_with_zero_to_the_left(tmp_path):
    for s, value in ((0, 0.8), (16, 0.7), (32, 0.6), (64, 0.5)):
        write_log(tmp_path / f"m2po-s{s}/attempt-1.jsonl", {1: {ACC: value + 0.1}, 2: {ACC: value}})
    report = build([tmp_path])
    axes = figures.accuracy_by_staleness(report.groups, report.tasks).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "16", "32", "64"]
    assert np.diff(axes.get_xticks()).tolist() == [1, 1, 1]
    final, best = (container.lines[0] for container in axes.containers)
    assert final.get_xdata().tolist() == best.get_xdata().tolist() == axes.get_xticks().tolist()
    np.testing.assert_allclose(final.get_ydata().astype(float), [0.8, 0.7, 0.6, 0.5])
    np.testing.assert_allclose(best.get_ydata().astype(float), [0.9, 0.8, 0.7, 0.6])


def test_an_exact_mode_is_one_cell_in_each_column(study):
    figure = figures.age_of_data(study.groups, study.tasks)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert "m2po, s=256\nall of age 64 from step 65" in titles
    group = next(group for group in study.groups if group.loss == "m2po")
    shares, unit = figures.age_shares(group)
    assert unit == "weight versions"
    assert (shares.max(axis=1) == 1).all()
    assert (shares.idxmax(axis=1).loc[65:] == 64).all()


def test_steps_that_were_not_logged_are_neither_drawn_nor_claimed(tmp_path):
    """Age 4 at steps 1 to 3 and 50 to 52: the claim begins at 50, and no cell or line lies between."""
    name = "training/off_policy/trajectory_staleness"
    report = report_of(tmp_path, {s: {f"{name}/min": 4, f"{name}/max": 4} for s in (1, 2, 3, 50, 51, 52)})
    axes = figures.age_of_data(report.groups, report.tasks).axes[0]
    assert axes.get_title(loc="left").endswith("\nall of age 4 from step 50")
    mesh = next(drawn for drawn in axes.collections if isinstance(drawn, QuadMesh))
    edges = mesh.get_coordinates()[0, :, 0]
    cells = zip(edges[:-1], edges[1:], mesh.get_array().mask[0], strict=True)
    drawn = [(left, right) for left, right, hidden in cells if not hidden]
    assert drawn == [(s - 0.5, s + 0.5) for s in (1, 2, 3, 50, 51, 52)]
    (line,) = axes.lines
    assert np.isnan(line.get_ydata()[3]) and 3 < line.get_xdata()[3] < 50


def test_a_run_of_one_step_is_seen_in_every_panel(tmp_path):
    rows = {1: stale_run("m2po", 4, seed=1, steps=3)[1] | {ACC: 0.5, "actor/m2po/second_moment_after": 0.01}}
    report = report_of(tmp_path, rows)
    for draw in (
        figures.accuracy,
        figures.left_out_fraction,
        figures.second_moment,
        figures.health,
        figures.throughput,
    ):
        for axes in draw(report.groups, report.tasks).axes:
            assert not axes.get_visible() or any(line.get_marker() != "None" for line in axes.lines), axes.get_title()


def test_ages_between_the_smallest_and_the_largest_are_spread_evenly(tmp_path):
    name = "training/off_policy/trajectory_staleness"
    report = report_of(tmp_path, {1: {f"{name}/min": 1, f"{name}/max": 4}, 2: {f"{name}/min": 2, f"{name}/max": 2}})
    shares, _ = figures.age_shares(report.groups[0])
    np.testing.assert_allclose(shares.to_numpy(), [[0, 0.25, 0.25, 0.25, 0.25], [0, 0, 1, 0, 0]])


@pytest.mark.parametrize("age", [1e15, -1e15])
def test_an_absurd_age_is_left_out_and_named(tmp_path, age):
    name = "training/off_policy/trajectory_staleness"
    rows = {step: {f"{name}/min": 4, f"{name}/max": 4} for step in range(1, 4)}
    rows[2] |= {f"{name}/min": min(4, age), f"{name}/max": max(4, age), "staleness/age_share/steps_to_1000000000000": 1}
    report = report_of(tmp_path, rows)
    shares, _ = figures.age_shares(report.groups[0])
    assert shares.shape == (2, 5) and list(shares.index) == [1, 3]
    absurd = [line for line in report.problems if "10000" in line]
    assert len(absurd) == 2 and "1 step(s), first at 2" in absurd[0]


def test_logged_buckets_of_ages_are_spread_over_the_ages_in_them(tmp_path):
    """to_1 is age 1 alone, to_4 is 3 and 4, to_8 is 5 to 8; a bucket without tokens is not logged."""
    name = "staleness/age_share/steps"
    report = report_of(
        tmp_path, {1: {f"{name}_to_0": 1.0}, 2: {f"{name}_to_1": 0.5, f"{name}_to_4": 0.5}, 3: {f"{name}_to_8": 1}}
    )
    shares, unit = figures.age_shares(report.groups[0])
    assert unit == "trainer steps"
    expected = [[1, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0.5, 0, 0.25, 0.25, 0, 0, 0, 0], [0] * 5 + [0.25] * 4]
    np.testing.assert_allclose(shares.to_numpy(), expected)


def test_a_trajectory_over_several_versions_is_as_old_as_its_oldest(tmp_path):
    """verl counts the age from the freshest weights of a trajectory; a flat line must not come from that."""
    name = "training/off_policy/trajectory_staleness"
    report = report_of(tmp_path, {1: {f"{name}/min": 2, f"{name}/max": 2, f"{name}_worst/max": 4}})
    shares, _ = figures.age_shares(report.groups[0])
    np.testing.assert_allclose(shares.to_numpy(), [[0, 0, 1 / 3, 1 / 3, 1 / 3]])


def test_the_phases_of_a_step_add_up_to_the_step(study):
    for group in study.groups:
        seconds = figures.phase_seconds(group)
        assert sum(value for phase, value in seconds.items() if phase != "testing") == pytest.approx(4.0)
    axes = figures.time_per_step(study.groups, study.tasks).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [group.label for group in study.groups]


def test_health_shows_what_was_logged_and_nothing_else(study):
    titles = [
        axes.get_title(loc="left") for axes in figures.health(study.groups, study.tasks).axes if axes.get_visible()
    ]
    assert "gradient norm" in titles and "entropy (nats per token)" not in titles


def test_time_to_accuracy_uses_training_seconds(study):
    by_step = lines(figures.accuracy(study.groups, study.tasks).axes[0])
    by_time = lines(figures.accuracy_by_time(study.groups, study.tasks).axes[0])
    for label, line in by_time.items():
        np.testing.assert_allclose(line.get_xdata(), 4.0 * by_step[label].get_xdata())
        np.testing.assert_allclose(line.get_ydata(), by_step[label].get_ydata())


def test_the_tail_of_the_longer_seeds_is_drawn_against_time_too(tmp_path):
    """Seeds of 4 s and 2 s a step; the slow one ends at step 20, where the mean clock is at 60 s."""
    for seed, (steps, seconds) in enumerate([(20, 4.0), (40, 2.0)]):
        rows = {s: {ACC: s / 100} | ({"timing_s/step": seconds} if s else {}) for s in range(0, steps + 1)}
        write_log(tmp_path / f"m2po-s256-seed{seed}/attempt-1.jsonl", rows)
    report = build([tmp_path])
    complete, tail = figures.accuracy_by_time(report.groups, report.tasks).axes[0].lines
    np.testing.assert_allclose(complete.get_xdata(), 3.0 * np.arange(21))
    np.testing.assert_allclose(tail.get_xdata(), 60 + 2.0 * np.arange(21))
    np.testing.assert_allclose(tail.get_ydata(), np.arange(20, 41) / 100)
    assert any("early ended m2po-s256-seed0 (20)" in line for line in report.problems)


@pytest.mark.parametrize("name", ["$x^$", "_hidden", "a\nb\tc", "\\frac{", "<b>&", "x" * 300, "日本"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_drawn_as_they_stand(tmp_path, name):
    write_log(tmp_path / "r/attempt-1.jsonl", {1: {ACC: 0.5, "timing_s/step": 1.0, "actor/pg_clipfrac": 0.1}})
    report = build([tmp_path])
    group = report.groups[0]
    object.__setattr__(group, "label", name)
    for draw in (figures.accuracy, figures.time_per_step, figures.left_out_fraction):
        figure = draw(report.groups, report.tasks)
        figure.draw_without_rendering()
    assert figures.accuracy(report.groups, report.tasks).legends[0].get_texts()[0].get_text() == plain(name)


def y_labels(axes) -> list[str]:
    axes.figure.draw_without_rendering()
    low, high = axes.get_ylim()
    return [label.get_text() for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]


@pytest.mark.parametrize("decades", [0.3, 1, 2, 3, 5, 7, 8, 9, 12, 30])
def test_a_log_axis_has_a_few_labels_however_many_decades_it_spans(tmp_path, decades):
    rows = {step: {metrics.SECOND_MOMENT_BEFORE: 10.0 ** (-decades * step / 10)} for step in range(11)}
    report = report_of(tmp_path, rows)
    axes = figures.second_moment(report.groups, report.tasks).axes[0]
    labels = y_labels(axes)
    assert 2 <= len(labels) <= 9
    boxes = [label.get_window_extent() for label in axes.get_yticklabels() if label.get_text() in labels]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_an_axis_with_one_validation_shows_that_step(tmp_path):
    report = report_of(tmp_path, {0: {ACC: 0.3}})
    axes = figures.accuracy(report.groups, report.tasks).axes[0]
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [0]


def test_results_at_one_staleness_are_no_line_against_staleness(tmp_path):
    report = report_of(tmp_path, {1: {ACC: 0.3}, 2: {ACC: 0.4}})
    with pytest.raises(figures.NothingToDraw, match=r"only one staleness \(8 updates\)"):
        figures.accuracy_by_staleness(report.groups, report.tasks)


def test_titles_over_neighbouring_panels_of_ages_do_not_overlap(tmp_path):
    for name in ("decoupled_loglinear", "no_trust_region"):
        ages = {step: {f"staleness/age_updates_{of}": 256.0 for of in ("mean", "max")} for step in range(1, 9)}
        for ablation in ("a", "b"):
            folder = tmp_path / f"{name}-with-a-long-name-of-its-own-{ablation}-s256"
            write_log(folder / "attempt-1.jsonl", ages)
    report = build([tmp_path])
    figure = figures.age_of_data(report.groups, report.tasks)
    figure.draw_without_rendering()
    titles = [axes._left_title for axes in figure.axes if axes._left_title.get_text()]
    assert len(titles) == 4 and all("all of age 256 from step 1" in title.get_text() for title in titles)
    boxes = [title.get_window_extent() for title in titles]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
