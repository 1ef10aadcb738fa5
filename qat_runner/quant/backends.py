"""The backends of the kernels by name: what a config may say, without what carries them out."""

BACKENDS = ("eager", "compiled", "triton")
"""The names of the backends; "auto" chooses among them."""
