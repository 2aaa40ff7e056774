"""A recipe of the user: a function in a file of her own, `--recipe my_recipes.py:mistral_7b_64k`."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from megatron_long.errors import ConfigError


def is_own(name: str) -> bool:
    """Return whether a recipe's name leads to a file.

    >>> is_own("my_recipes.py:mistral_7b_64k"), is_own("llama3_8b_128k")
    (True, False)
    """
    return ".py" in name


def load_function(name: str) -> Callable[[], object]:
    """Run a file of Python and return one of its functions.

    Args:
        name: PATH.py:FUNCTION; the file runs with the rights of the user, as her own program.
    Raises: ConfigError: no such file or function, or the file fails.
    """
    path, separator, function = name.rpartition(":")
    if not separator or not path.endswith(".py") or not function.isidentifier():
        raise ConfigError(
            f"--recipe {name}: write FILE.py:FUNCTION, such as my_recipes.py:mistral_7b_64k"
        )
    if not Path(path).is_file():
        raise ConfigError(f"--recipe {name}: there is no file {path}; give its path")
    found = getattr(_run(path, name), function, None)
    if not callable(found):
        raise ConfigError(f"--recipe {name}: {path} defines no function {function}")
    return found


def _run(path: str, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of any kind: it is a program
        raise ConfigError(
            f"--recipe {name}: {path} fails ({type(error).__name__}: {error}); see that "
            f"`python {path}` works"
        ) from error
    return module
