"""Errors that a user can cause. The command line prints them as one line and exits with code 2."""


class UserError(ValueError):
    """Something given from outside does not fit; the message says what was given, what was expected, what to do."""


class ConfigError(UserError):
    """A configuration that is unknown, of the wrong type or contradicts itself."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, corrupt or belongs to another configuration."""


class DataError(UserError):
    """A data source or batch that cannot be read or does not have the promised shape."""


class NonFiniteError(UserError):
    """A loss or gradient is not finite; training stopped before the optimizer step."""
