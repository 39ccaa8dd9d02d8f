"""Benchmarks against peers: `python -m benchmarks [memory|postgres|footprint|counts]`.

Not tests: a test never measures time. What can be counted exactly (statements, round trips) is gated by
`counts`; what is timed is reported as ratios to peers that ran in the same minute, alternating.
"""
