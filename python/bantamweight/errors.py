"""What bantamweight raises on bad input: one sentence that names it, what is allowed, and the mend."""


class BantamweightError(ValueError):
    """Root of the errors below; catch it to handle every kind of bad input."""


class CalibrationError(BantamweightError):
    """Calibration data that is empty, not finite, or does not fit the model."""


class FormatError(BantamweightError):
    """A file or a state dict that is damaged, hostile, newer than this version, or another model's."""


class UnsupportedLayerError(BantamweightError):
    """A layer, or a setting of a layer, that the asked-for step cannot handle."""


class KernelError(BantamweightError):
    """A kernel that cannot run on this machine, or refused its arguments."""
