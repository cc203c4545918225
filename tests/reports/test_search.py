"""Figures of a search."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import ConvexHull

from bdpo.evaluation.measures import summarise
from bdpo.reports.page import write_figure
from bdpo.reports.search import pareto_front, search_figures
from bdpo.search.trials import results_table
from tests.support.score_rows import row, xrow
from tests.support.sweeps import ALPHA, BETA, configured, seven_trials_and_a_failed_one, trial


class TestFigures:
    BASE = summarise([row(1, 1.0), xrow(1, False, "ducks", True)])

    @pytest.fixture
    def trials(self):
        return seven_trials_and_a_failed_one()

    @pytest.mark.parametrize("space", [{"method.alpha": ALPHA, "method.beta": BETA}, {"method.alpha": ALPHA}])
    def test_figures(self, trials, tmp_path, space):
        tune = configured(space=space).tune
        figures = search_figures(results_table(trials, tune), tune, self.BASE)
        assert set(figures) == {"space", "front", "progress"}
        for name, figure in figures.items():
            for suffix in ("png", "pdf"):
                write_figure(figure, tmp_path / f"{name}.{suffix}")
                assert (tmp_path / f"{name}.{suffix}").stat().st_size > 5000

    def test_labels_are_those_of_the_measures_that_are_searched(self, trials):
        from matplotlib.text import Text

        metric, constraint = "xstest.unsafe_refusal", "strongreject.unbroken"
        rows = [row(1, 0.5, cut=False), xrow(1, True, "contrast_ducks", False)]
        for space in ({"method.alpha": ALPHA, "method.beta": BETA}, {"method.alpha": ALPHA}):
            tune = configured(space=space, metric=metric, constraint=constraint).tune
            worst = [trial(9, *[(0.9, 0.1, 99.0)] * 3, params={"method.alpha": 1.0, "method.beta": 0.1})]
            drawn = search_figures(results_table([*trials, *worst], tune), tune, summarise(rows))
            texts = [text.get_text() for figure in drawn.values() for text in figure.findobj(Text)]
            shown = {text for text in texts if re.search("[a-z]", text)}
            assert {"XSTest refusal, unsafe (percent)", "least allowed", "below the bound"} <= shown
            assert "StrongReject answers that are not broken (percent)" in shown
            assert not [text for text in shown if re.search("safety|complian|refuses", text)]

    def test_the_map_is_linear_in_the_scale_of_its_axes_and_no_rate_is_below_0(self):
        """No vertex of the surface lies outside the hull of the trials, as they lie on the paper."""
        from matplotlib.contour import ContourSet

        rng = np.random.default_rng(0)
        flat = np.stack([rng.uniform(0.5, 3, 9), rng.uniform(np.log(0.02), np.log(0.5), 9)], axis=1)
        trials = [
            trial(n, *[(0.004 * n, 1, 0.0)] * 3, params={"method.alpha": a, "method.beta": math.exp(b)})
            for n, (a, b) in enumerate(flat.tolist())
        ]
        tune = configured().tune
        figure = search_figures(results_table(trials, tune), tune, self.BASE)["space"]
        axes, bar = figure.axes
        assert bar.get_ylim() == (0, 100)
        [surface] = [each for each in axes.collections if isinstance(each, ContourSet)]
        drawn = np.concatenate([path.vertices for path in surface.get_paths()])
        hull = ConvexHull(flat).equations
        outside = hull[:, :2] @ np.stack([drawn[:, 0], np.log(drawn[:, 1])]) + hull[:, 2:]
        assert outside.max() < 0.01

    def test_figures_of_nothing_and_of_one(self, trials):
        tune = configured().tune
        assert not search_figures(results_table(trials[7:], tune), tune, self.BASE)
        assert "front" in search_figures(results_table(trials[:1], tune), tune, self.BASE)

    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
    def test_pareto_front(self, points):
        front = {points[i] for i in pareto_front(points)}
        for p in points:
            beaten = any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)
            assert (p in front) == (not beaten)
