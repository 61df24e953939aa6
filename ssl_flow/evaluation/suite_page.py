"""The template of a suite's report.html: one file, no network."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 1.5em auto; padding: 0 1em }
h2 { margin-top: 2em; border-bottom: 1px solid #8886 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { border-bottom: 1px solid #8884; padding: .2em .8em .2em 0; text-align: right }
td { white-space: nowrap }
td:first-child, th:first-child { text-align: left; min-width: 7em; white-space: normal }
tr:first-child th { border-bottom: 1.5px solid; border-top: 1.5px solid }
.wide, pre { overflow-x: auto } pre { background: #8882; padding: .7em 1em }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere }
small, .note { color: #888; font-size: .85em } .failed { color: #c0392b }
.strips { display: grid; grid-template-columns: minmax(4em, 9em) 1fr; gap: 4px 10px;
  align-items: center; font-size: .85em; overflow-wrap: anywhere }
.strips img { width: 100%; display: block }
.marked { position: relative }
.marked button { position: absolute; transform: translate(-50%, -50%); width: 20px; height: 20px;
  padding: 0; border-radius: 50%; border: 2px solid #fff; background: #000a; color: #fff;
  font: bold 11px/1 system-ui; cursor: pointer }
.marked button.on { background: #d55e00 }
.swatch { display: inline-block; width: .9em; height: .9em; margin: 0 .3em 0 1em;
  vertical-align: -.1em; border: 1px solid #8888 }
@media print { .marked button:not(.on) { display: none } details { break-inside: avoid } }
</style></head><body>
{% macro strips(rows) %}<div class="strips">{% for label, picture in rows %}
<span>{{ label }}</span>{% if picture.startswith("data:") %}
<img alt="{{ label }}" src="{{ picture }}">
{%- else %}<span class="failed">{{ picture }}</span>{% endif %}{% endfor %}</div>{% endmacro %}
{% macro grid(heads, rows) %}<div class="wide"><table>
<tr>{% for head in heads %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endmacro %}
<h1>{{ title }}</h1>
{{ grid(*summary) }}
<p class="note">{{ note }}</p>
{% if failures %}<h2>Failed</h2><ul>{% for failure in failures %}
<li class="failed">{{ failure }}</li>{% endfor %}</ul>{% endif %}
{% for table in tables %}
<h2>{{ table.title }}</h2>
{{ grid(*table.grid) }}
<p>{{ table.verdict }}</p>
{% if table.bars %}<img alt="{{ table.title }}" src="{{ table.bars }}">{% endif %}

<p class="note">Protocol: {{ table.settings }}<br>{{ table.split }} Dots in the plot:
single runs, where there are several.</p>
{% if table.per_class[1] %}<details><summary>Score of each class</summary>
{{ grid(*table.per_class) }}</details>{% endif %}
{% if table.strips %}<h3>Predictions</h3>{{ strips(table.strips) }}
<p class="note">{% for name, color in table.legend %}<span class="swatch"
 style="background: rgb({{ color | join(',') }})"></span>{{ name }}{% endfor %}
<span class="swatch" style="background: rgb(224, 224, 192)"></span>ignored</p>{% endif %}
{% if table.hardest %}<h3>Hardest {{ table.hardest.what }}</h3>
{% if table.hardest.strips %}{{ strips(table.hardest.strips) }}{% endif %}
{{ grid(table.hardest.heads, table.hardest.rows) }}
<p class="note">Those with the lowest {{ table.hardest.score }} of their own, in the mean over the
encoders' first runs. A mean of such numbers is not the score of the set.</p>{% endif %}
{% endfor %}
{% for data in pictures %}<h2>{{ data.name }}: what the encoders see</h2>
<h3>Principal components</h3>{{ strips(data.pca) }}
<p class="note">The first three principal components of an encoder's features as red, green, blue:
one basis an encoder, over all these images. Features: all levels on one grid, each of unit length
at every pixel. Which colour is which means nothing.</p>
{% if data.marks %}<h3>Similarity to a marked pixel</h3>
<div class="marks"><div class="strips"><span>image <small>(choose a pixel by a click)</small></span>
<div class="marked"><img alt="images" src="{{ data.image }}">{% for mark in data.marks %}
<button style="left: {{ mark.left }}%; top: {{ mark.top }}%"
{% if loop.first %} class="on"{% endif %}
 onclick="choose(this)">{{ loop.index }}</button>{% endfor %}</div></div>
{% for mark in data.marks %}<div class="sheet"{% if not loop.first %} hidden{% endif %}>
{{ strips(mark.rows) }}</div>{% endfor %}</div>
<p class="note">Cosine similarity of the same features at every pixel to those at the marked one,
from the smallest value in these images (dark) to the largest (bright), for each encoder by itself.
</p>{% endif %}
{% endfor %}
{% for title, shown in sheets %}<h2>{{ title }}</h2>
{% for caption, picture in shown %}<p>{{ caption | capitalize }}</p>
{% if picture %}<img alt="{{ caption }}" src="{{ picture }}" style="max-width: 100%">{% endif %}
{% endfor %}{% endfor %}
<h2>How this was made</h2>
<pre class="command">{{ results.command }}</pre>
<p>{{ results.date }}; {% for key, value in results.versions.items() %}{{ key }} {{ value }}
{% endfor %}</p>
{{ grid(*encoders) }}
<br>{{ grid(*data_sets) }}
<script>
function choose(button) {
  const marks = button.closest(".marks"), chosen = Number(button.textContent) - 1;
  marks.querySelectorAll(".sheet").forEach((sheet, i) => { sheet.hidden = i !== chosen });
  marks.querySelectorAll("button").forEach((one) => one.classList.toggle("on", one === button));
}
</script>
</body></html>
"""
