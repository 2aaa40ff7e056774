"""Errors for the user to fix: each says what is wrong, the value seen, the rule, the remedy."""


class UserError(Exception):
    """Base of the errors that tools print as one paragraph and turn into exit status 2."""


class ConfigError(UserError):
    """A flag, a recipe or a model configuration breaks a rule."""


class DataError(UserError):
    """An input file is missing, damaged or invalid; names `file:line` if possible."""
