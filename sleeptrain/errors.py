"""Errors with a message for the user, who is shown no traceback."""


class UserError(Exception):
    """Shown as one line without a traceback; the command exits with code 2."""


class HealthError(Exception):
    """A run ends itself, since its numbers are not to be trusted. Shown as one line; exit code 1."""


class NonFiniteError(HealthError):
    """A loss or gradient is NaN or infinite; names step, window, pass and layer."""


class SpikeError(HealthError):
    """The loss or the gradient norm lies far above those of the steps before."""


class DivergedError(HealthError):
    """Processes that should hold the same weights do not; names them and the first parameter that differs."""


class CheckpointError(Exception):
    """A checkpoint could not be written. Shown as one line where it was the last of a run; exit code 1."""


class ConfigError(UserError):
    """A setting is unknown, has a wrong value, or does not go with another."""


class DataError(UserError):
    """A file is missing, damaged, or does not belong with the others."""


class PeerError(DataError):
    """Another process of the run has failed, and says why."""
