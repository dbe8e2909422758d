"""One HTML file that holds everything: style, figures as SVG, the glyphs that its text needs. No scripts, no links out.

Texts of figures stay texts, which the browser draws: sharp on a phone and on paper, in any script, and searchable.
"""

import base64
import html
import io
import re
import warnings
from collections.abc import Iterable, Sequence

import matplotlib
from PIL import Image

from vlm_jax.report import fonts
from vlm_jax.report.figures.style import Picture, styled

STYLE = f"""
body {{ font: 16px/1.5 "{fonts.PAGE}", system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 1100px; margin: 2.5em auto; padding: 0 1.5em; overflow-wrap: break-word; }}
h1 {{ font-size: 1.7em; margin: 0; }} h2 {{ font-size: 1.3em; margin: 2.2em 0 .4em; }}
h3 {{ font-size: 1.05em; margin: 1.8em 0 .2em; }} p, ul {{ margin: .3em 0 .6em; color: #555; max-width: 46em; }}
ul {{ padding-left: 1.2em; }} figure {{ margin: 0; }}
svg {{ max-width: 100%; height: auto; display: block; }}
svg text {{ font-family: "{fonts.PAGE}", "DejaVu Sans", sans-serif; }}
.wide {{ overflow-x: auto; }}
pre {{ background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 13px; }}
table {{ border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .25em .9em; vertical-align: top; }}
th {{ font-weight: 600; border-bottom: 2px solid #1a1a1a; vertical-align: bottom; }}
td {{ white-space: nowrap; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
td.text, th.text {{ text-align: left; white-space: normal; min-width: 11em; }}
small {{ display: block; color: #666; font-size: .78em; }}
summary {{ cursor: pointer; font-weight: 600; margin: .6em 0; }}
code {{ font-size: 13px; overflow-wrap: anywhere; white-space: normal; }} code span {{ display: inline-block; }}
@media (max-width: 700px) {{
  body {{ margin: 1.2em auto; padding: 0 1em; }} .wide svg {{ max-width: none; zoom: .8; }}
  th, td {{ padding: .25em .6em; }} td.text {{ min-width: 8em; }}
}}
@media print {{
  @page {{ margin: 15mm; }}
  body {{ margin: 0; padding: 0; max-width: none; font-size: 10.5pt; print-color-adjust: exact; }}
  h2, h3 {{ break-after: avoid; }} section, figure, tr {{ break-inside: avoid; }}
  thead {{ display: table-header-group; }}
  .wide {{ overflow: visible; }} pre {{ overflow: visible; white-space: pre-wrap; }}
  td, th {{ padding: .2em .5em; white-space: normal; }} svg {{ max-height: 215mm; }}
}}
"""
DPI = 160  # of the pictures inside figures
PNG = re.compile(r"data:image/png;base64,([^\"]+)")


def document(title: str, sections: Iterable[str]) -> str:
    """Returns a whole page of HTML.

    Args:
      title: plain text, the page's name and heading.
      sections: HTML; empty ones are left out.
    """
    title, body = html.escape(title), "\n".join(filter(None, sections))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}{fonts.css(title + body)}</style></head>\n"
        f"<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = ()) -> str:
    """Returns a table of cells in HTML, which scrolls sideways where the page is narrow.

    Args:
      head: the first row; empty for none.
      rows: the others.
      text: the columns that hold sentences, and wrap.
    """
    sides = dict.fromkeys(text, ' class="text"')
    row = lambda tag, cells: (
        "<tr>" + "".join(f"<{tag}{sides.get(i, '')}>{cell}</{tag}>" for i, cell in enumerate(cells)) + "</tr>\n"
    )
    top = f"<thead>{row('th', head)}</thead>\n" if head else ""
    return f'<div class="wide"><table>{top}<tbody>{"".join(row("td", cells) for cells in rows)}</tbody></table></div>'


@styled()
def figure(picture: Picture, alt: str, name: str) -> str:
    """Returns a figure as SVG in HTML; on a phone a wide one keeps a readable size and scrolls.

    Args:
      picture: the figure.
      alt: what it shows, for readers who do not see it.
      name: unlike that of the page's other figures.
    """
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing")  # the browser has it, or a font that it asks
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        picture.savefig(written, format="svg", dpi=DPI, metadata=metadata)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") + 4 :]
    svg = re.sub(r'(<(?:g|image)\b[^>]*?) id="[^"]*"', r"\1", svg)  # names that several have and nothing refers to
    svg = re.sub(r" ?font-family: [^;\"]*;?", "", svg)  # the page's style names the fonts
    svg = PNG.sub(_smaller, svg)
    wide = ' class="wide"' if picture.get_figwidth() > 6 else ""
    return f'<figure{wide}><svg role="img" aria-label="{html.escape(alt)}"{svg}</figure>'


def _smaller(png: re.Match) -> str:
    """A picture in a figure, as JPEG where that takes less than half the bytes: photographs."""
    with Image.open(io.BytesIO(base64.b64decode(png[1]))) as image:
        opaque = image.mode == "RGB" or image.convert("RGBA").getextrema()[3][0] == 255
        data = io.BytesIO()
        if opaque:
            image.convert("RGB").save(data, "JPEG", quality=85)
    jpeg = base64.b64encode(data.getvalue()).decode()
    return f"data:image/jpeg;base64,{jpeg}" if opaque and len(jpeg) < len(png[1]) / 2 else png[0]
