"""The page as ``report.html``: one file without scripts that needs nothing else."""

from jinja2 import DictLoader, Environment, StrictUndefined

from bdlora_perf.report.page import Page

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --page: #ffffff; --band: #f6f8fa;
  --loud: #9a3412; --loud-page: #fff1e7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117;
  --band: #151b23; --loud: #ffb77c; --loud-page: #3a1d0b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3, summary { font-size: 1rem; font-weight: 600; margin: 1.5rem 0 .5rem; }
summary { cursor: pointer; }
.loud { margin: .75rem 0; padding: .6rem .9rem; border-left: .3rem solid var(--loud); background: var(--loud-page);
  color: var(--loud); font-weight: 600; }
.loud.label { font-size: 1.25rem; text-transform: uppercase; letter-spacing: .03em; }
.scroll { overflow-x: auto; }
.caption { color: var(--soft); font-size: .87rem; margin: .4rem 0 0; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  vertical-align: top; }
th { border-bottom-width: 2px; vertical-align: bottom; white-space: normal; }
th.text, td.text { text-align: left; white-space: normal; max-width: 34rem; overflow-wrap: break-word; }
td.text:first-child { min-width: 8.5rem; }
tbody tr:nth-child(even) { background: var(--band); }
figure { margin: 0; }
figure svg { display: block; max-width: 100%; min-width: 36rem; height: auto; }
pre { padding: .75rem; background: var(--band); border: 1px solid var(--line); font-size: .8rem; overflow-x: auto;
  overflow-wrap: normal; }
@media print { details > * { display: block; } }
"""

# Templates by the type of block that they render.
_TEMPLATES = {
    "Page": """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<h1>{{ page.title }}</h1>
{% if page.label %}
<p class="loud label">{{ page.label }}</p>
{% endif %}
{% for warning in page.warnings %}
<p class="loud">{{ warning }}</p>
{% endfor %}
{% for section in page.sections %}
<h2>{{ section.title }}</h2>
{% for block in section.blocks %}
{% include block.__class__.__name__ %}
{% endfor %}
{% endfor %}
</body>
</html>
""",
    "Table": """\
{% if block.folded %}
<details>
<summary>{{ block.title }}</summary>
{% elif block.title %}
<h3>{{ block.title }}</h3>
{% endif %}
<div class="scroll" tabindex="0">
<table>
<thead><tr>
{% for cell in block.columns %}
<th{% if loop.index0 < block.texts %} class="text"{% endif %}>{{ cell }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in block.rows %}
<tr>
{% for cell in row %}
<td{% if loop.index0 < block.texts %} class="text"{% endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if block.caption %}
<p class="caption">{{ block.caption }}</p>
{% endif %}
{% if block.folded %}
</details>
{% endif %}
""",
    "Plot": """\
<h3>{{ block.title }}</h3>
<figure role="img" aria-label="{{ block.title }}">
<div class="scroll" tabindex="0">{{ block.svg | safe }}</div>
<figcaption class="caption">{{ block.caption }}</figcaption>
</figure>
""",
    "Log": """\
<h3>{{ block.title }}</h3>
<p>{{ block.message }}</p>
{% if block.text %}
<pre tabindex="0">{{ block.text }}</pre>
{% endif %}
""",
    "Items": """\
<ul>
{% for text in block.texts %}
<li>{{ text }}</li>
{% endfor %}
</ul>
""",
}


def render_html(page: Page) -> str:
    """The whole page; all text is escaped."""
    environment = Environment(
        loader=DictLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template("Page").render(page=page, style=_STYLE)
