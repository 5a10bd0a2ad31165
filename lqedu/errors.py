"""The errors lqedu raises on purpose: one clear sentence each, naming what is wrong and the remedy."""


class LqeduError(Exception):
    """Base of every error that lqedu raises on purpose."""


class UsageError(LqeduError):
    """An argument, option or name that does not make sense."""


class GridError(LqeduError):
    """A grid that contradicts itself, or does not fit the weight it is asked to describe."""


class CalibrationError(LqeduError):
    """Calibration or evaluation data that cannot give an answer: empty, too short, or rank-deficient."""


class NotPositiveDefiniteError(CalibrationError):
    """A Hessian that cannot be factored: too few calibration tokens for the damping used."""


class CheckpointError(LqeduError):
    """A checkpoint that cannot be read or written: foreign, truncated, incomplete, or a full disk."""


class ExportError(LqeduError):
    """A quantized model that another tool's checkpoint format cannot hold without changing it."""


class UnsupportedModelError(LqeduError):
    """A model whose architecture lqedu does not describe."""


class MissingDependencyError(LqeduError):
    """Something outside lqedu (a package, a network, a GPU) that the request needs and this machine lacks."""
