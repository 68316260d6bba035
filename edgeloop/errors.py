"""What edgeloop raises when the user can do something about it. The message is one sentence that says what."""


class EdgeloopError(Exception):
    """Base of all of them. `exit_code` is the command line's: 2 where another command would do, 1 for a failure."""

    exit_code = 2


class LoopError(EdgeloopError, ValueError):
    """A loop spec is wrong, does not fit the model, or the model cannot be looped."""


class ModelError(EdgeloopError, ValueError):
    """A model file is missing, incomplete or not a model."""


class HubError(ModelError):
    """The model hub cannot be reached or does not give a file."""

    exit_code = 1


class WriteError(EdgeloopError):
    """A file cannot be written."""

    exit_code = 1
