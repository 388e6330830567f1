"""Errors that a user can cause. The command line prints them as one line and exits with their code."""

EXIT_USER = 2  # something given, or the machine, must be put right first
EXIT_RESUME = 75  # EX_TEMPFAIL: nothing is wrong with what was given; the same command goes on from the last checkpoint


_LOADER_DEATHS = ("DataLoader worker", "Pin memory thread exited")  # how torch begins


class UserError(ValueError):
    """Something given from outside does not fit; the message says what was given, what was expected, what to do."""

    exit_code = EXIT_USER


class ConfigError(UserError):
    """A configuration that is unknown, of the wrong type or contradicts itself."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, corrupt or belongs to another configuration."""


class ContextError(UserError):
    """A prompt and what follows it are longer than the model reads."""


class DataError(UserError):
    """A data source or batch that cannot be read or does not have the promised shape."""


class NonFiniteError(UserError):
    """A loss or gradient is not finite; training stopped before the optimizer step."""


class StoppedError(UserError):
    """Ranks that we launched were asked to stop, or lost one of them; the same command goes on."""

    exit_code = EXIT_RESUME


class WorkerLostError(UserError):
    """A process that loads data has been killed; the same command goes on."""

    exit_code = EXIT_RESUME


def is_loader_death(error: BaseException) -> bool:
    """Whether it is torch's word that a worker of a loader has died: a RuntimeError, raised wherever the main thread
    happens to be, also where files are written."""
    return isinstance(error, RuntimeError) and str(error).lstrip().startswith(_LOADER_DEATHS)


class RankLostError(UserError):
    """Another rank has died, or ended with an error of its own, whose exit code this one then has too."""

    def __init__(self, message: str, exit_code: int = EXIT_RESUME) -> None:
        super().__init__(message)
        self.exit_code = exit_code
