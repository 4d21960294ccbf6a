"""The page as ``report.md``, in GitHub's Markdown; plots are files beside it."""

import re
from functools import singledispatch
from html import escape

from bdlora_perf.report.page import Items, Log, Page
from bdlora_perf.report.plots import Plot
from bdlora_perf.report.tables import Table


def render_markdown(page: Page) -> str:
    """The whole page; the plots are expected as ``plots/<name>.svg``."""
    lines = [f"# {_escape(page.title)}", ""]
    if page.label:
        lines += [f"> **{_escape(page.label)}**", ""]
    for warning in page.warnings:
        lines += [f"**{_escape(warning)}**", ""]
    for section in page.sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            lines += [*_render(block), ""]
    return "\n".join(lines)


@singledispatch
def _render(block: object) -> list[str]:
    raise AssertionError(f"no Markdown for {type(block).__name__}")


@_render.register
def _(table: Table) -> list[str]:
    lines = ["| " + " | ".join(map(_escape, table.columns)) + " |"]
    lines.append("|" + "|".join(" --- " if i < table.texts else " ---: " for i in range(len(table.columns))) + "|")
    lines += ["| " + " | ".join(map(_escape, row)) + " |" for row in table.rows]
    if table.caption:
        lines += ["", _escape(table.caption)]
    if table.folded:
        return ["<details>", f"<summary>{escape(table.title)}</summary>", "", *lines, "", "</details>"]
    return [f"### {_escape(table.title)}", "", *lines] if table.title else lines


@_render.register
def _(plot: Plot) -> list[str]:
    return [
        f"### {_escape(plot.title)}",
        "",
        f"![{_escape(plot.title)}](plots/{plot.name}.svg)",
        "",
        _escape(plot.caption),
    ]


@_render.register
def _(log: Log) -> list[str]:
    lines = [f"### {_escape(log.title)}", "", _escape(log.message)]
    if log.text:
        # Longer than any fence inside.
        fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", log.text)), 3)
        lines += ["", f"{fence}text", log.text.rstrip("\n"), fence]
    return lines


@_render.register
def _(items: Items) -> list[str]:
    return [f"- {_escape(text)}" for text in items.texts]


def _escape(text: str) -> str:
    """One line in which no character has a meaning of its own."""
    return re.sub(r"([\\`*_<>|\[\]#~&$])", r"\\\1", " ".join(text.split()))
