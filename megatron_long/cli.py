"""Shared by all command-line tools: user errors become one paragraph and exit status 2."""

import argparse
import errno
import os
import re
import select
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from megatron_long.errors import UserError

USER_ERROR_STATUS = 2


def tool_parser(documentation: str | None) -> argparse.ArgumentParser:
    """Return a tool's parser: its docstring's first paragraph before the flags, the rest after them.

    Flags must be written out: an abbreviation would mean another flag as soon as one is added.
    """
    description, _, epilog = (documentation or "").partition("\n\n")
    return argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def length_tokens(text: str) -> int:
    """Read a length of a window, a document or a batch row, in tokens; for argparse's `type`.

    K and M are 1,024 and 1,024^2, as in context lengths: 128K is 131,072. Token counts, such as
    --train-tokens, use thousands (`mixture.shares.parse_token_count`).

    Raises: argparse.ArgumentTypeError: not a positive whole number of tokens.

    >>> length_tokens("64K"), length_tokens("128k"), length_tokens("1M"), length_tokens("81920")
    (65536, 131072, 1048576, 81920)
    """
    match = re.fullmatch(r"([0-9]+)([kKmM]?)", text.strip())
    length = int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()] if match else 0
    if length < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a length of 1 token or more; write digits, or K for 1,024 tokens: 131072 "
            "or 128K"
        )
    return length


def run_tool(main: Callable[[], int | None], *, prints_result: bool = True) -> int:
    """Run a tool's `main` and give its exit status.

    The first rank of each node to fail prints, so that a torchrun job shows the message once in each node's
    log: a file may be missing on one of them, and torchrun ends the others at once.

    Args:
        main: The tool; returns None or an exit status.
        prints_result: Whether the tool has done its work when its output is closed, as with
            `| head`; training has not.
    Returns: 0 or what `main` returned; 2 after a `UserError`; 130 after Ctrl-C.
    """
    try:
        return main() or 0
    except UserError as error:
        return _tell(str(error))
    except UnicodeEncodeError:
        odd = [word for word in sys.argv if re.search("[\ud800-\udfff]", word)]
        if not odd:
            raise
        return _tell(f"{odd[0]!a} has bytes that are not UTF-8; give another path")
    except BrokenPipeError:
        if not prints_result or not _nobody_reads_stdout():
            raise  # another pipe, such as that of a process that has died
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return _tell(f"{error.filename} is too long for a file's name; give a shorter path")
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return 130


def _tell(message: str) -> int:
    paragraph = " ".join(f"error: {message}".split())
    filled = textwrap.fill(paragraph, width=100, break_long_words=False, break_on_hyphens=False)
    if _is_first_to_tell():
        print(filled, file=sys.stderr)
    return USER_ERROR_STATUS


def _is_first_to_tell() -> bool:
    """Whether no other rank of this node has printed its error; the claim is in torchrun's own folder."""
    own_file, rank = os.environ.get("TORCHELASTIC_ERROR_FILE"), os.environ.get("LOCAL_RANK")
    if rank is None or not own_file:  # ATTEMPT/RANK/error.json
        return rank in (None, "0")
    try:
        os.close(os.open(Path(own_file).parents[1] / "told", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        return rank == "0"
    return True


def _nobody_reads_stdout() -> bool:
    try:
        stdout = sys.stdout.fileno()
    except (AttributeError, OSError):  # none, or replaced by an object that is not a file
        return False
    errors = select.poll()
    errors.register(stdout, 0)  # errors are always reported
    return bool(errors.poll(0))
