"""HTML gives the text that a reader of the page reads, and nothing of what surrounds it."""

import pytest

from data_pipeline.corpora.html_text import html_text

HELP_PAGE = """<!DOCTYPE html>
<html lang="fr"><head><base href="../"><noscript><meta http-equiv="refresh" content="0"></noscript>
<meta http-equiv="Content-Type" content="text/html; charset=utf-8">
<title>La page</title><script>if (1 < 2) menu();</script><style>p { color: red }</style></head>
<body><header id="TopLeftHeader"><a><p>Aide 7.4</p></a><button>Module</button><nav>Un</nav></header>
<aside class="rightside"><label>Contenu</label></aside>
<div id="DisplayArea"><a name="x"></a><meta itemprop="keywords" content="mots">
<h1><a name="y"></a>L'onglet <span>Date</span></h1>
<p>Choisissez   <em>Format</em> -
<b>Cellule</b>&nbsp;: 1 &lt; 2 &amp; &eacute;&#233;.<br>Puis <code>OK</code>.</p>
<table border="1"><tr><th><p>Nom</p></th><th><p>Effet</p></th></tr>
<tr><td>a</td><td> un
mot </td></tr><tr><td>b</td><td><p>une ligne</p><p>une autre</p></td></tr></table>
<ul><li>premier</li><li>second</li></ul>
<pre>
Sub Main
    If a &lt; b Then

    End If<br>End Sub
</pre>
<p hidden>caché</p><p style="color: red; display:none">caché</p><i aria-hidden="true">*</i>
<select><option>un</option></select><!-- un commentaire --><template><p>t</p></template>
</div><footer><h3>debug</h3></footer><script>end()</script></body></html>"""

HELP_TEXT = """L'onglet Date
Choisissez Format - Cellule\u00a0: 1 < 2 & éé.
Puis OK.
Nom\tEffet
a\tun mot
b
une ligne
une autre
premier
second
Sub Main
    If a < b Then

    End If
End Sub"""


def test_page_gives_its_text_and_nothing_around_it() -> None:
    assert html_text(HELP_PAGE.encode()) == HELP_TEXT


def test_header_of_an_article_and_one_with_the_title_are_text() -> None:
    page = b"""<header><h1>Title</h1></header><article><header>By A</header><p>One</p>
    <aside>Note</aside><footer>Written in May</footer></article><aside>Links</aside>"""
    assert html_text(page) == "Title\nBy A\nOne\nNote\nWritten in May"


def test_tables_in_tables_keep_their_rows() -> None:
    page = b"""<table><tr><td>left</td><td><p>above</p><table><tr><td>1<td>2<tr><td>3<td>4</table>
    </td><td>right</td></tr></table>"""
    assert html_text(page) == "left\nabove\n1\t2\n3\t4\nright"


@pytest.mark.parametrize(
    ("page", "codec"),
    [
        ("<p>é €", "utf-8"),
        ("\ufeff<p>é €", "utf-8"),
        ("\ufeff<p>é €", "utf-16-le"),
        ("<meta charset='windows-1251'><p>Привет", "cp1251"),
        (
            '<meta http-equiv=Content-Type content="text/html; charset=Shift_JIS"><p>日本',
            "shift_jis",
        ),
        ('<?xml version="1.0" encoding="ISO-8859-1"?><html><p>é</p></html>', "latin-1"),
        ("<meta charset=iso-8859-1><p>“é” €", "cp1252"),  # what browsers take it for
        ("<meta charset=rot13><p>é", "utf-8"),
        ("<meta charset=no-such-thing><p>é", "utf-8"),
    ],
)
def test_charset_is_that_of_the_page(page: str, codec: str) -> None:
    assert html_text(page.encode(codec)) == page.rpartition("<p>")[2].partition("<")[0]


@pytest.mark.parametrize("page", [b"<p>\xe9</p>", b"<meta charset=utf-8><p>\xff"])
def test_page_that_is_not_in_its_charset_is_an_error(page: bytes) -> None:
    with pytest.raises(UnicodeDecodeError):
        html_text(page)


def test_self_closed_elements_of_xhtml_swallow_nothing() -> None:
    page = b"""<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title/>
    <script src="a.js"/></head><body><p>One</p><a id="x"/><p>Two</p></body></html>"""
    assert html_text(page) == "One\nTwo"


def test_page_without_text_is_empty() -> None:
    assert html_text(b"") == html_text(b"<title>t</title><script>x</script>") == ""


def test_elements_may_nest_deeper_than_the_stack() -> None:
    assert html_text(b"<b>" * 20_000 + b"deep") == "deep"
