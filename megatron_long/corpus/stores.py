"""Object stores behind fsspec URLs: what fails is tried again, then reported as the store's failure."""

import io
import logging
import time
from collections.abc import Callable
from typing import Any

from megatron_long.errors import ConfigError, DataError, UserError

logger = logging.getLogger(__name__)

AT_START = 2
"""Waits while the user waits for the first answer, which a wrong address never gives."""
RETRY_SECONDS = (1, 4, 16, 64)
"""Waits between attempts, besides those of the packages: s3fs retries cut connections for 2 s only."""


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path inside it.

    Raises: ConfigError: fsspec, or its package for this kind of store, is not installed.
    """
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        kind = url.partition("://")[0]
        package = {"s3": " s3fs", "gs": " gcsfs", "gcs": " gcsfs", "abfs": " adlfs"}.get(kind, "")
        raise ConfigError(f"{url}: {error}; `pip install fsspec{package}`") from None
    except ValueError as error:
        raise ConfigError(
            f"{url}: {error}; give a path, or a URL such as s3://BUCKET/FOLDER"
        ) from None


def attempt[Result](url: str, action: Callable[[], Result], waits: int | None = None) -> Result:
    """Return what an action on a store gives; if it fails, try again after each wait, or the first ones.

    Raises: DataError: there is no such object. ConfigError: access is denied, or the last attempt failed.
    """
    for wait in (*RETRY_SECONDS[:waits], None):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # the packages of the stores have no common class of errors
            if wait is None or _is_final(error):
                raise _explain(url, error) from error
            logger.warning("%s: %s; trying again in %s s", url, _describe(error), wait)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _is_final(error: Exception) -> bool:
    return isinstance(
        error, FileNotFoundError | PermissionError | NotImplementedError
    ) or _lacks_key(error)


def _lacks_key(error: Exception) -> bool:
    return "Credentials" in type(error).__name__  # botocore's


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _explain(url: str, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{url} does not exist ({error}); check the bucket and the name")
    if isinstance(error, PermissionError) or _lacks_key(error):
        return ConfigError(
            f"{url}: access is denied ({_describe(error)}); check the credentials (for s3: "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials), on every node"
        )
    return ConfigError(
        f"{url}: the store fails ({_describe(error)}); when it works, the same command resumes where it was"
    )


class StoreFile(io.RawIOBase):
    """Reads an object; a failure of the store is never taken for damage of the file.

    Raises: UserError: the store keeps failing.
    """

    def __init__(self, url: str) -> None:
        self._url, self._position = url, 0
        self._file: Any = attempt(url, self._open)

    def _open(self) -> Any:
        system, path = file_system(self._url)
        return system.open(path, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = self._file.seek(offset, whence)
        return self._position

    def readinto(self, buffer: Any) -> int:
        def read() -> int:
            if self._file is None:
                self._file = self._open()
            try:
                self._file.seek(self._position)
                return int(self._file.readinto(buffer) or 0)
            except BaseException:
                self._file = None  # its buffer may be half filled
                raise

        count = attempt(self._url, read)
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()
