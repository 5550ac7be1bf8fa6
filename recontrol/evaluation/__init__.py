"""Evaluation: settings of control compared, metrics, and reports."""
