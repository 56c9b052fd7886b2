"""Conversations as transformers' chat templates write them, and dates as Python writes them.

Usage: python make_chat.py (writes chat.json beside itself).
"""

import datetime
import json
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATES = {
    "generation": "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}{% endfor %}",
    "generation, lines": """{%- for m in messages %}
    {%- if m['role'] == 'assistant' %}
        {%- generation %}
            {%- set inner = m['content'] %}
            {{- inner + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {% generation -%}
            {{ m['content'] }}
        {%+ endgeneration +%}
        tail
    {%- endif %}
{%- endfor %}
{{ "leaks" if inner is defined }}""",
    "none": "{{ [tools, documents] | tojson }}{% if tools is defined and documents is none %} none{% endif %}{% if tools is not none %}TOOLS{% endif %}{% if tools %}TOOLS{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
    "date": "{% if strftime_now is defined %}{{ strftime_now('%%') }}{% endif %}{{ strftime_now('day') }}",
}
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
]
FORMATS = ["%d %b %Y", "%A %d %B %Y", "%Y-%m-%d", "%B %d, %Y", "%-d/%-m/%y", "%H:%M:%S", "%I:%M %p", "%j %a %e", "100%%"]

if __name__ == "__main__":
    rendered = []
    for name, template in TEMPLATES.items():
        for conversation in CONVERSATIONS:
            texts, _ = render_jinja_template(conversations=[conversation], chat_template=template, bos_token="<s>", eos_token="</s>")
            rendered.append({"name": name, "template": template, "messages": conversation, "text": texts[0]})
    moment = datetime.datetime(2024, 7, 6, 9, 5, 3)
    dates = [{"format": f, "text": moment.strftime(f)} for f in FORMATS]
    out = Path(__file__).parent / "chat.json"
    out.write_text(json.dumps({"rendered": rendered, "dates": dates}, ensure_ascii=False, indent=1) + "\n")
