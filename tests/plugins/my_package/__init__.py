"""A third-party package with one example of everything that can be added to qat_runner, one file each."""
