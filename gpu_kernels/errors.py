"""Errors of this package: one root, a ValueError, so that callers need no import to catch bad input."""


class AcceleratorError(ValueError):
    """Root of everything that this package raises on bad input or a failed lane."""


class DeviceNotFoundError(AcceleratorError):
    """The device that was asked for does not exist on this machine."""


class SlotError(AcceleratorError):
    """A slot number, slot size or record size that does not fit what was allocated."""


class LaneError(AcceleratorError):
    """A copy or a computation on the accelerator failed; the cause is chained."""


class LostError(LaneError):
    """The accelerator hangs, or has failed as a whole: nothing that was submitted to it will end, and nothing more may
    be."""


class ClosedError(AcceleratorError):
    """The accelerator was used after close()."""


class GraphError(AcceleratorError):
    """Work that a device cannot record as a graph; the cause is chained."""


class DriverError(AcceleratorError):
    """The driver cannot be called by compiled code here, or has refused something; the text says why."""
