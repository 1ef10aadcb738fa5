"""Names of the kernel backends, for validating configs without importing the kernels."""

BACKENDS = ("eager", "compiled", "triton")
"""Names of the backends; a config may also name "auto", which chooses one of them."""
