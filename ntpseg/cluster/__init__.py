"""What a run on many machines needs besides training: checks before it is paid for."""
