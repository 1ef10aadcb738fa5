"""The run folder: the content of each file, reading and writing it, the lock, and the environment of a run."""
