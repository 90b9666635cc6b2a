"""A report as an HTML page: every kind of block, nothing from elsewhere, names that look like tags."""

import base64
from pathlib import Path

from mhmoe_fairseq.analysis.reports.page import html_page

TEXT = """# A <b>report</b>

Two lines
of **text**, `a < b`, [there](https://example.org/a).
- first
- second & last

| model | ppl |
|-------|----:|
| <i>x</i> | 1.50 |

![Loss & ppl](plots/loss.png)

```bash
train --a '<x>'

evaluate
```

End"""


def test_every_block_of_a_report_has_its_element(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.png").write_bytes(b"png")
    page = html_page(TEXT, tmp_path)
    for element in (
        "<title>A &lt;b&gt;report&lt;/b&gt;</title>",
        "<h1>A &lt;b&gt;report&lt;/b&gt;</h1>",
        '<p>Two lines of <strong>text</strong>, <code>a &lt; b</code>, <a href="https://example.org/a">there</a>.</p>',
        "<ul><li>first</li><li>second &amp; last</li></ul>",
        '<tr><th>model</th><th class="number">ppl</th></tr>',
        '<tr><td>&lt;i&gt;x&lt;/i&gt;</td><td class="number">1.50</td></tr>',
        f'<img alt="Loss &amp; ppl" src="data:image/png;base64,{base64.b64encode(b"png").decode()}">',
        "<pre>train --a &#x27;&lt;x&gt;&#x27;\n\nevaluate</pre>",
        "<p>End</p>",
    ):
        assert element in page, element
