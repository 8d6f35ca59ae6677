"""Benchmarks: one file per question, one JSON format, limits of the machine measured beside every result."""
