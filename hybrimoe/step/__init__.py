"""The compiled way of a decode step: a model's own modules are read into a program of `cpu_kernels.step`, compared with
the original, and then serve the calls that they can."""
