"""Helpers of every folder: atomic files, progress bars, argument checks, lazy exports. Imports nothing of ntpseg."""
