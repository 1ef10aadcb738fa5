"""The operations that cost time, each once per backend. `eager` is the reference."""
