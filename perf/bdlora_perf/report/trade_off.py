"""One metric against another, a line for each family of systems: the paper's trade-off."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import seaborn as sns
from scipy import stats

from bdlora_perf.report.axes import set_axes
from bdlora_perf.report.frame import CONFIDENCE, Results, count_rounds, describe, label_with_unit
from bdlora_perf.report.plots import Drawing, finish, panelled


@dataclass(frozen=True)
class TradeOff:
    """Means over the rounds with Student's t interval; one panel for each combination of the dimensions ``panels``.

    Systems say by their details ``kind`` whether they take part, and by ``family`` which line they are on.
    """

    name: str
    title: str
    y: str
    x: str
    kinds: tuple[str, ...]
    panels: tuple[str, ...]

    def draw(self, results: Results) -> Drawing | None:
        details = {name: system.details for name, system in results.report.systems.items()}
        systems = [name for name in results.systems if details[name].get("kind") in self.kinds]
        if not {details[name]["kind"] for name in systems} >= set(self.kinds[1:]):
            return None  # the baseline alone
        own = results.rows(self.x, systems)[["system", "point", "round", "value"]]
        pairs = results.rows(self.y, systems).merge(own, on=["system", "point", "round"], suffixes=("", "_x"))
        if pairs.empty:
            return None
        families = [*dict.fromkeys(str(details[name]["family"]) for name in systems)]
        pairs["label"] = pd.Categorical(pairs.system.map(lambda name: details[name]["family"]), families, ordered=True)
        panels = [
            # Two systems of one family may stand for one adapter, beside different baselines.
            (describe(group), rows.drop_duplicates(["label", "value_x", "round"]))
            for group, points in results.groups(pairs.point, self.panels)
            for rows in [pairs[pairs.point.isin(points)]]
        ]
        shown, left_out = panelled(panels)
        panels_drawn = shown.panel.nunique()
        grid = sns.relplot(
            shown, kind="line", x="value_x", y="value", hue="label", style="label", palette="colorblind", col="panel",
            col_wrap=min(3, panels_drawn), height=3.0, aspect=max(1.1, 3.2 / panels_drawn), markers=True, dashes=False,
            err_style="bars", estimator="mean", errorbar=_interval, facet_kws={"sharex": False, "sharey": False},
        )  # fmt: skip
        x, y = (label_with_unit(results.report.metrics[name]) for name in (self.x, self.y))
        for axes, (_, drawn) in zip(grid.axes.flat, shown.groupby("panel", observed=True), strict=True):
            set_axes(axes, sorted(set(drawn.value_x)), False, False, from_zero=False)
        finish(grid, x, y)
        rounds = count_rounds(shown.groupby(["panel", "label", "value_x"], observed=True)["round"].nunique())
        caption = f"Means of {rounds}; error bars: Student's t intervals, {CONFIDENCE:.0%}. {left_out}"
        return Drawing(grid, self.title, caption)


def _interval(values: pd.Series) -> tuple[float, float]:
    if len(values) < 2:
        return np.nan, np.nan
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)
    return float(values.mean() - half), float(values.mean() + half)
