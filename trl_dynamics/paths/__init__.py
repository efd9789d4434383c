"""paths: learning paths of probe answers, and squeezing. A subject: kinds of row, summary, metrics and rules.

kinds.py and records.py: what is recorded and how it is read. step_table.py, metrics.py, changes.py, summary.py,
samples.py: what the rows say at every step. rules.py (with displacement.py, degeneration.py, objective.py,
finiteness.py) and comparison.py: findings. Torch-free; may import store, findings, statistics, probing.{schema,io}.
"""
