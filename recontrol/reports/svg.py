"""Figures as SVG that stands inside an HTML page: its text takes the page's colour and font, and nothing in it points elsewhere."""

import contextlib
import html
import io
import re
from collections.abc import Iterator
from typing import Any

# Told apart by readers who cannot tell red from green (Okabe and Ito's palette).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
RED = "#D55E00"
# Stands for the page's own colour of text, which is another one in the dark.
INK = "#123456"
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "legend.frameon": False,
    "grid.alpha": 0.18,
    "axes.grid": True,
    "lines.markersize": 4.5,
    **{name: INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")},
    # Names may have a dollar in them.
    "text.parse_math": False,
    # Letters stay text: they can be searched and copied, and need no room.
    "svg.fonttype": "none",
}


@contextlib.contextmanager
def drawing(width: float, height: float) -> Iterator[Any]:
    """A figure in the style of the page; `to_svg` must be called inside as well.

    Args:
        width: in inches, 72 of its units each.
        height: likewise.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: Any, name: str, description: str) -> str:
    """The figure as an element of a page.

    Args:
        figure: of matplotlib.
        name: of letters, digits and dashes, another one for each figure of a page: its marks are called by it.
        description: what is to be seen, for readers who do not see it.
    """
    import matplotlib

    written = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = text.replace(INK, "currentColor").replace("xlink:href=", "href=")
    used = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r"(href=\"|url\()#", rf"\1#{name}-", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    # Only the shape is kept of the size, so that the page says how large it is.
    box = re.search(r'viewBox="[^"]+"', text)
    assert box is not None
    opening = f'<svg {box[0]} role="img" aria-label="{html.escape(description)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1).strip()
