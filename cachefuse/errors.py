"""The errors a user may meet. Each is also the builtin that a Python caller would expect to catch."""


class CachefuseError(Exception):
    """Something the user can mend; the command line prints it as one line and exits with code 1."""


class UnknownNameError(CachefuseError, LookupError):
    """A name that is not in a registry: an unknown encoder family, fusion, loss, class."""


class PluginError(CachefuseError, ImportError):
    """What another installed package adds (a fusion, a head, a loss) and can't be used; names the package."""


class ManifestError(CachefuseError, ValueError):
    """A dataset manifest that does not parse or does not validate; names the file and the key."""


class DataError(CachefuseError, ValueError):
    """Raw data that contradicts its manifest: a missing column, an id that occurs twice."""


class MissingDataError(CachefuseError, FileNotFoundError):
    """Raw data that is not there; says where to get it and where to put it."""


class BadSampleError(CachefuseError, ValueError):
    """One image or text that can't be used. Never stops a run: the row is marked absent and listed."""


class EncoderError(CachefuseError, RuntimeError):
    """An encoder that can't be opened; says what was tried and what works offline."""


class CacheError(CachefuseError, RuntimeError):
    """A feature store that is absent, incomplete, or was made from something else."""


class ConfigError(CachefuseError, ValueError):
    """Settings that are out of range or contradict one another or the dataset."""


class TrainingError(CachefuseError, ArithmeticError):
    """Training that diverged."""


class RunError(CachefuseError, ValueError):
    """A run directory that is absent, incomplete, or does not belong to this store."""


class SubmissionError(CachefuseError, ValueError):
    """Predictions that the competition's format would not accept."""
