"""HTML to text: what a reader of the page would read, one line per block.

Owns the rules by which markup becomes text, and the only import of selectolax. Leaves which
files are HTML to `text_files`.
"""

import codecs
import re

from selectolax.lexbor import LexborHTMLParser, LexborNode

# What a page shows around its text, or doesn't show at all. Outside an article or a section, a
# <header>, <footer> or <aside> belongs to the site, not to the page, unless it contains the title.
_DROPPED = ", ".join(
    (
        "head, title, script, style, noscript, template, nav, menu, dialog, iframe, object, svg",
        "canvas, audio, video, button, select, textarea, datalist",
        "[hidden], [aria-hidden=true], [style*='display:none'], [style*='display: none']",
        "[role=navigation], [role=search], [role=banner], [role=contentinfo]",
        "header:not(article header, main header, section header, :has(h1))",
        "footer:not(article footer, main footer, section footer)",
        "aside:not(article aside, main aside, section aside)",
    )
)
_BLOCKS = frozenset(
    re.findall(
        r"\w+",
        "address article aside blockquote body br caption center dd details div dl dt fieldset "
        "figcaption figure footer form h1 h2 h3 h4 h5 h6 header hr html legend li main ol p pre "
        "section summary table tbody td tfoot th thead tr ul",
    )
)
_CELLS = ("td", "th")
_SPACES = re.compile(r"[ \t\n\f\r]+")  # HTML's white space; a no-break space is text

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# The HTML standard looks for a charset in the first 1024 bytes only.
_CHARSET = re.compile(
    rb"<(?:meta\s[^>]*?charset|\?xml\s[^>]*?encoding)\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE
)
# In XHTML `<script/>` is complete; parsed as HTML it would swallow everything that follows.
_XHTML = b"http://www.w3.org/1999/xhtml"
_SELF_CLOSED = re.compile(
    r"<(script|style|title|textarea|iframe|noscript|a|div|span|p)\b([^<>]*)/>"
)


def html_text(content: bytes) -> str:
    """The text of an HTML page, without its markup: a line for each block.

    The cells of a table row form one line, separated by tabs, if each cell is a single line.
    Scripts, styles, navigation, form controls and hidden elements are left out. Entities are
    decoded. Runs of white space become one space, except in <pre>, which is kept as it is.

    Raises UnicodeDecodeError if the bytes are not in the page's charset (UTF-8 if it names none).
    """
    markup = _decoded(content)
    if _XHTML in content[:1024]:
        markup = _SELF_CLOSED.sub(r"<\1\2></\1>", markup)
    tree = LexborHTMLParser(markup)
    for node in tree.css(_DROPPED):
        node.decompose()
    return "" if tree.body is None else "\n".join(_lines(tree.body))


def _decoded(content: bytes) -> str:
    for mark, codec in _BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            return content[len(mark) :].decode(codec)
    declared = _CHARSET.search(content[:1024])
    return content.decode(_codec(declared[1].decode("ascii")) if declared else "utf-8")


def _codec(label: str) -> str:
    """Python's codec for a declared charset, by the HTML standard's rules for legacy labels."""
    try:
        codec = codecs.lookup(label).name
        "".encode(codec)  # raises for codecs that aren't charsets: rot13, base64
    except LookupError:
        return "utf-8"
    if codec in ("ascii", "iso8859-1"):
        return "cp1252"
    return "utf-8" if codec.startswith("utf") else codec


def _lines(body: LexborNode) -> list[str]:
    """The lines of a tree. Not recursive: pages nest deeper than Python's stack allows."""
    text = _Lines()
    above: list[tuple[LexborNode, str]] = []
    node = body.first_child
    while node is not None or above:
        if node is None:
            node, tag = above.pop()
            if tag in _BLOCKS:
                text.end(tag)
            node = node.next
            continue
        tag = node.tag or ""
        if tag == "-text":
            text.add(node.text_content or "")
        elif tag == "pre":
            text.add_preformatted(node)
        else:
            if tag in _BLOCKS:
                text.begin(tag)
            above.append((node, tag))
            node = node.first_child
            continue
        node = node.next
    text.end_line()
    return text.lines


class _Lines:
    """Collects text into lines: one per block, and one per table row with single-line cells."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._parts: list[str] = []
        self._rows: list[list[str]] = []  # the cells so far of each open row; tables can be nested
        self._cells: list[int] = []  # the number of lines at the start of each open cell

    def add(self, text: str) -> None:
        self._parts.append(text)

    def add_preformatted(self, node: LexborNode) -> None:
        self.end_line()
        for line_break in node.css("br"):
            line_break.replace_with("\n")
        self.lines += node.text().strip("\r\n").splitlines()

    def begin(self, tag: str) -> None:
        self.end_line()
        if tag == "tr":
            self._rows.append([])
        elif tag in _CELLS:
            self._cells.append(len(self.lines))

    def end(self, tag: str) -> None:
        self.end_line()
        if tag == "tr":
            self._end_row(self._rows.pop(), at=len(self.lines))
        elif tag in _CELLS:
            self._end_cell(self._cells.pop())

    def end_line(self) -> None:
        line = _SPACES.sub(" ", "".join(self._parts)).strip(" ")
        self._parts.clear()
        if line:
            self.lines.append(line)

    def _end_cell(self, first: int) -> None:
        if not self._rows:  # a cell outside a table, in markup that a script assembled
            return
        row = self._rows[-1]
        if len(self.lines) - first <= 1:
            row.append("".join(self.lines[first:]))
            del self.lines[first:]
        else:
            self._end_row(row, at=first)

    def _end_row(self, row: list[str], *, at: int) -> None:
        if any(row):
            self.lines.insert(at, "\t".join(row).strip("\t"))
        row.clear()
