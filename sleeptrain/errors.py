"""Errors that a user can mend: each message names the setting or file and the way out."""


class UserError(Exception):
    """Shown as one line without a traceback; the command exits with code 2."""


class ConfigError(UserError):
    """A setting is unknown, has a wrong value, or does not go with another."""


class DataError(UserError):
    """A file is missing, damaged, or does not belong with the others."""
