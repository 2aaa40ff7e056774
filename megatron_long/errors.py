"""Errors that are the user's to fix: each says what is wrong, the value seen, the rule, the remedy."""


class UserError(Exception):
    """Base of the errors that tools print as one paragraph and turn into exit status 2."""


class ConfigError(UserError):
    """A flag, a recipe or a model configuration breaks a rule."""


class DataError(UserError):
    """An input file is missing, damaged or not what it should be; names `file:line` where it can."""
