"""HTML to text, and the rules by which a page is kept.

The pages are generated documentation of a few known kinds, so rules for their frames do; preformatted
blocks keep their lines, which general extractors of an article's text lose.
"""

import html
import re

DROPPED = re.compile(
    r"(?is)<!--.*?-->"
    r"|<(script|style|nav|header|footer|aside|form|head|svg|noscript|button|select|template)\b.*?</\1\s*>"
)
FRAMES = (
    (
        r'(?i)<div[^>]*role="main"[^>]*>',
        r'(?i)<div class="(sphinxsidebar|clearer|related)"|<footer',
    ),
    (r"(?i)<main\b[^>]*>", r"(?i)</main>"),
    (r"(?i)<article\b[^>]*>", r"(?i)</article>(?!.*</article>)"),
    (r'(?i)<div id="DisplayArea"[^>]*>', r'(?i)<div id="DonationFrame|</body>'),
    (r"(?i)<body\b[^>]*>", r"(?i)</body>"),
)
"""Beginning and end of a page's content; the first that is there counts."""
NAVIGATION = re.compile(
    r'(?is)<div class="(navheader|navfooter|header|toctree-wrapper[^"]*|sphinxsidebar[^"]*|breadcrumb[^"]*'
    r'|up|chlinks)"[^>]*>.*?</div>'
    r'|<a class="headerlink".*?</a>|<a[^>]*>\s*(Prev|Next|Up|Home)\s*</a>'
)
BLOCK = re.compile(
    r"(?i)</?(p|div|li|ul|ol|dl|dt|dd|tr|table|h[1-6]|section|blockquote|br|hr|center|caption|tbody|thead"
    r"|figure|figcaption|article|details|summary)\b[^>]*>"
)
CELL_END = re.compile(r"(?i)</t[dh]\s*>")
TAG = re.compile(r"<[^<>]*>")
PREFORMATTED = re.compile(r"(?is)<pre\b[^>]*>(.*?)</pre>")
PARAGRAPH_SIGNS = str.maketrans("", "", "\u00b6\uf0c1")
FOOT_CHARS = 600
"""From a page's end, where Sphinx's links to the topics around it may stand."""

INDEX_PAGE = re.compile(
    r"(?i)(genindex|py-modindex|modindex|/search|404|/toc\.|bookindex|-index\.html|contents\.html"
    r"|Function-Index|mod/directives|/quickreference|release-notes/index|biblio|_static|keyword-index"
    r"|doc-index)"
)
"""Names of pages that hold no prose."""


def html_to_text(page: str) -> str:
    """Return a page's text: a line a block, preformatted text as it is.

    >>> html_to_text("<body><nav>x</nav><p>One\\n<b>two</b> &amp; three<pre>a\\n  b</pre></body>")
    'One two & three\\n\\na\\n  b'
    """
    page = NAVIGATION.sub(" ", _content(DROPPED.sub(" ", page)))
    parts, position = [], 0
    for match in PREFORMATTED.finditer(page):
        parts.append(_flowing(page[position : match.start()]))
        parts.append(f"\n{html.unescape(TAG.sub('', match.group(1))).rstrip()}\n")
        position = match.end()
    parts.append(_flowing(page[position:]))
    text = "\n".join(parts).translate(PARAGRAPH_SIGNS)
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()
    foot = text.find("\nPrevious topic\n", max(0, len(text) - FOOT_CHARS))
    return text[:foot].strip() if foot > 0 else text


def _content(page: str) -> str:
    for begin, end in FRAMES:
        first = re.search(begin, page)
        if first:
            last = re.compile(end).search(page, first.end())
            return page[first.end() : last.start() if last else len(page)]
    return page


def _flowing(part: str) -> str:
    part = BLOCK.sub("\n", CELL_END.sub(" \t", re.sub(r"\s+", " ", part)))
    part = html.unescape(TAG.sub("", part)) if "<" in part or "&" in part else part
    return re.sub(r" ?\n ?", "\n", re.sub(r"[ \t\xa0]+", " ", part))


def is_prose(text: str) -> bool:
    """Whether a page is more than a list of links or a table of signs."""
    if len(text) < 300:
        return False
    lines = [line for line in text.split("\n") if line]
    short = sum(len(line.split()) <= 3 for line in lines)
    if len(lines) > 30 and short > 0.75 * len(lines):
        return False
    head = text[:20_000]
    return sum(char.isalpha() or char.isspace() for char in head) / len(head) > 0.62


def c4_lines(text: str) -> str:
    """Keep what C4's rules keep: lines of five words that end as a sentence, at least three sentences.

    >>> c4_lines("Home | Next")
    ''
    """
    lines = [
        line.strip()
        for line in text.split("\n")
        if len(line.split()) >= 5 and line.rstrip()[-1:] in '.!?"'
    ]
    kept = "\n".join(lines)
    num_sentences = len(re.findall(r"[.!?](\s|$)", kept))
    return kept if num_sentences >= 3 and len(kept) >= 200 and "{" not in kept else ""
