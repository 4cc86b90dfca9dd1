"""Benchmarks of ntpseg: part of a checkout, not of the installed package. Run them with ``ntpseg bench``."""
