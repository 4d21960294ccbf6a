"""How points, settings and figures are said, on every page alike."""

from collections.abc import Iterable, Mapping

from bdlora_perf.report.schema import Metric, Value


def describe(point: Mapping[str, Value], dimensions: Iterable[str] | None = None) -> str:
    """A point in words, e.g. ``concurrency 8, uniform``: names stand for themselves."""
    names = sorted(point) if dimensions is None else [name for name in dimensions if name in point]
    words = [v if isinstance(v := point[name], str) else f"{spaced(name)} {format_value(v)}" for name in names]
    return ", ".join(words) or "all points"


def label_with_unit(metric: Metric) -> str:
    return f"{metric.label} [{metric.unit}]" if metric.unit else metric.label


def spaced(name: str) -> str:
    """A dimension, setting or detail in words."""
    return name.replace("_", " ")


def count_rounds(counts: Iterable[int]) -> str:
    """How many rounds stand behind some figures, e.g. ``3 rounds`` or ``2 to 3 rounds``."""
    found = sorted(set(counts))
    if found == [1]:
        return "1 round"
    return f"{found[0]} rounds" if len(found) == 1 else f"{found[0]} to {found[-1]} rounds"


def format_value(value: Value) -> str:
    """A setting or a dimension: exactly what it is."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return str(value)


def format_number(value: float) -> str:
    """A measured figure: four significant digits, all digits of whole numbers."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}"
