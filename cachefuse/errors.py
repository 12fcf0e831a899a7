"""The errors that a user may meet. Each is also the builtin error that a Python caller would catch."""


class CachefuseError(Exception):
    """An error that the user can fix. The command line prints it as one line and exits with code 1."""


class UnknownNameError(CachefuseError, LookupError):
    """A name that is not in a registry: an unknown encoder family, fusion, loss, class."""


class PluginError(CachefuseError, ImportError):
    """What another installed package adds (a fusion, a head, a loss) and cannot be used; names the package."""


class ManifestError(CachefuseError, ValueError):
    """A dataset manifest that is not valid. The message names the file and the key."""


class DataError(CachefuseError, ValueError):
    """Raw data that contradicts its manifest: a missing column, an id that occurs twice."""


class MissingDataError(CachefuseError, FileNotFoundError):
    """Raw data that is missing. The message says where to get it and where to put it."""


class BadSampleError(CachefuseError, ValueError):
    """One unusable image or text. It never stops a run: its row is marked absent and listed."""


class EncoderError(CachefuseError, RuntimeError):
    """An encoder that cannot be opened. The message says what was tried and what works offline."""


class CacheError(CachefuseError, RuntimeError):
    """A feature store that is missing, incomplete, or made from other data or encoders."""


class ConfigError(CachefuseError, ValueError):
    """Settings that are out of range, or contradict each other or the dataset."""


class TrainingError(CachefuseError, ArithmeticError):
    """Training that diverged."""


class RunError(CachefuseError, ValueError):
    """A run directory that is missing, incomplete, or belongs to another store."""


class SubmissionError(CachefuseError, ValueError):
    """Predictions that the competition would reject."""
