"""The run folder: what each file holds, reading and writing it, the lock, and where a run came from."""
