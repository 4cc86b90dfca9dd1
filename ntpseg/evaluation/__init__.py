"""Metrics, evaluation runs and reports."""
