"""Templates of the report: one page that needs nothing else, with a section per comparison or run."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #ccc; --mark: #eef4ff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #16181c; --line: #444; --mark: #1f2a3d; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 66rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; overflow-wrap: normal; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, .left td, .left th { text-align: left; } .left td { white-space: normal; }
tr.chosen { background: var(--mark); font-weight: 600; } section + section { border-top: 3px solid var(--line); }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; } pre { white-space: pre-wrap; }
@media print { :root { --ink: #000; --paper: #fff; --line: #999; --mark: #eee; }
  body { margin: 0; max-width: none; font-size: 11px; } figure, tr { break-inside: avoid; }
  .wide { overflow: visible; } table { font-size: 7px; }
  th, td { white-space: normal; overflow-wrap: anywhere; padding: .1rem .2rem; } }
</style></head><body>
{% for section in sections %}<section>{{ section | safe }}</section>{% endfor %}
</body></html>
"""

COMPARISON = """<h1>{% if advice.method %}Recommended: {{ advice.method }}{% else %}No method fits{% endif %}</h1>
<p>on {{ data }} ({{ kind }}), base {{ base }}
{%- if advice.runner_up %}; runner-up: {{ advice.runner_up }}{% endif %}</p>
<ul>{% for s in advice.reasons %}<li>{{ s }}</li>{% endfor %}</ul>
{% if cut %}<h2>What was cut</h2><ul>{% for s in cut %}<li>{{ s }}</li>{% endfor %}</ul>{% endif %}
{% if advice.excluded %}<h2>Not considered</h2><ul>
{% for m, why in advice.excluded.items() %}<li>{{ m }}: {{ why }}</li>{% endfor %}</ul>{% endif %}
<h2>Measured</h2><div class="wide"><table>
<tr><th>method</th><th>{{ metric }}</th><th>95 % interval</th><th>seeds</th><th>p, best</th><th>p, full</th>
<th>trained</th><th>share</th><th>file, bytes</th>
<th>{{ tasks or 1 }} task{{ "s" if (tasks or 1) > 1 }}, bytes</th><th>training s</th>
<th>memory MB</th><th>one text ms</th><th>merged ms</th><th>texts/s</th><th>slowdown</th><th>forgetting</th><th>ECE</th>
<th>fixed</th><th>broken</th><th>rate</th></tr>
{% for r in results %}<tr{% if r.method == advice.method %} class="chosen"{% endif %}><td>{{ r.method }}
{%- if r.partial %} (ended early){% endif %}</td>
<td>{{ r.value | num(4) }}</td><td>{{ r.low | num(4) }} to {{ r.high | num(4) }}</td>
<td>{{ r["values"] | length }}</td><td>{{ r.p_best | num(3) }}</td><td>{{ r.p_full | num(3) }}</td>
<td>{{ "{:,}".format(r.parameters) }}</td><td>{{ (100 * r.share) | num(2) }} %</td>
<td>{{ "{:,}".format(r.bytes) }}</td><td>{{ "{:,}".format(r.total_bytes or 0) }}</td>
<td>{{ r.seconds | num(1) }}</td><td>{{ (r.memory / 1e6) | num(0) if r.memory else "" }}</td>
<td>{{ (1000 * r.latency) | num(1) }}</td>
<td>{{ (1000 * r.merged_latency) | num(1) if r.merged_latency else ("" if r.mergeable else "no") }}</td>
<td>{{ r.throughput | num(0) }}</td><td>{{ r.slowdown | num(2) }}</td><td>{{ r.forgetting | num(3) }}</td>
<td>{{ r.ece | num(3) }}</td><td>{{ r.fixed }}</td><td>{{ r.broken }}</td>
<td>{{ r.lr if r.lr is not none else "" }}</td></tr>
{% endfor %}</table></div>
<p>Within the noise of the best: {{ advice.equal | join(", ") }}. Beaten by none on score, file and speed at once:
{{ advice.front | join(", ") }}. p-values are paired over seeds and examples and adjusted for the number of methods
(Holm).
Forgetting is the change on neutral text with the adapter on: {{ "the base's loss, nats per token" if
results[-1].forgetting_measure == "loss" else "1 - cosine of the base's states, as it has no head to lose with" }}.
Training time and memory are those of one run by itself; texts/s are of 16 at once, attached.</p>
{% for title, figure in figures.items() %}<h2>{{ title }}</h2><figure>{{ figure | safe }}</figure>{% endfor %}
{% for r in results if r.method == advice.method and r.examples %}
{% for which, rows in r.examples.items() if rows %}<h2>Rows that {{ r.method }} {{ which }}</h2>
<div class="wide left"><table><tr><th>text</th><th>label</th><th>base alone</th><th>{{ r.method }}</th></tr>
{% for e in rows %}<tr><td>{{ e.text | truncate(300) }}</td><td>{{ e.label }}</td><td>{{ e.base }}</td>
<td>{{ e.method }}</td></tr>{% endfor %}</table></div>{% endfor %}{% endfor %}
""" + (
    TAIL := """<h2>How it was made</h2>
{% if command %}<pre>{{ command }}</pre>{% endif %}
<div class="wide left"><table>{% for k, v in facts.items() %}<tr><td>{{ k }}</td><td>{{ v }}</td></tr>
{% endfor %}</table>
</div>
"""
)

RUN = (
    """<h1>{{ ref or method }}</h1>
<p>{{ method }} on {{ data }} ({{ kind }}), base {{ base }}, scored on {{ rows }} rows of {{ split }}</p>
{% if why %}<p>{{ why }}</p>{% endif %}
<div class="wide"><table><tr><th></th><th>{{ metric }}</th><th>95 % interval</th></tr>
<tr><td>base alone</td><td>{{ base_value | num(4) }}</td>
<td>{{ base_interval[0] | num(4) }} to {{ base_interval[1] | num(4) }}</td></tr>
<tr class="chosen"><td>with adapter</td><td>{{ value | num(4) }}</td>
<td>{{ interval[0] | num(4) }} to {{ interval[1] | num(4) }}</td></tr></table></div>
{% if test %}<p>Difference {{ test.difference | num(4) }}, 95 % interval {{ test.low | num(4) }}
to {{ test.high | num(4) }},
p = {{ test.p_value | num(4) }} ({{ test.test }}).</p>{% endif %}
<p>{{ "{:,}".format(parameters) }} trained values ({{ (100 * share) | num(2) }} % of the base's),
{{ "{:,}".format(bytes) }} bytes, {{ seconds | num(1) }} s of training.</p>
{% for s in notes %}<p>{{ s }}</p>{% endfor %}
{% for title, figure in figures.items() %}<h2>{{ title }}</h2><figure>{{ figure | safe }}</figure>{% endfor %}
"""
    + TAIL
)
