"""Measures: the judge that reads pictures back, accuracies with intervals, and the report."""
