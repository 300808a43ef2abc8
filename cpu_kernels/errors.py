"""Errors of `cpu_kernels`: one root, so that callers can catch everything this package raises on purpose."""


class KernelError(ValueError):
    """Root of the errors of `cpu_kernels`: says what was expected, what was found and what to do."""


class LayoutError(KernelError):
    """A record, a weight or a buffer does not have the size, dtype or shape that its spec asks for."""


class DispatchError(KernelError):
    """Router output or positions are not usable (shape, dtype, index out of range, duplicates)."""


class ActivationValueError(KernelError):
    """Input rows contain NaN or infinity."""


class BackendError(KernelError):
    """A backend is unknown, not installed, not usable on this machine, or does not support a spec."""


class IsaError(KernelError):
    """The instruction set asked for is unknown or not supported by this CPU."""


class ThreadingError(KernelError):
    """A number of threads is out of range."""
