"""influence: what single training steps did to observed answers, as recorded. A subject.

kind.py: what is recorded; summary.py and series.py: what it says; rules.py: findings. The mathematics is in akg/, the
recording in trainers/influence/. Torch-free; may import store, findings, statistics, probing.schema.
"""
