"""What edgeloop raises when the user can do something about it. The message is one sentence that says what."""


class EdgeloopError(Exception):
    """Base of all of them."""


class LoopError(EdgeloopError, ValueError):
    """A loop spec is wrong, does not fit the model, or the model cannot be looped."""


class ModelError(EdgeloopError, ValueError):
    """A model file is missing, incomplete or not a model."""
