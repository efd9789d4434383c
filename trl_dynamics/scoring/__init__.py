"""scoring: a model and a probe set -> columns of numbers, the same on any number of processes.

engine.py scores, sampling.py lets the model answer; head_check.py, layout_check.py and precision.py see to it that the
numbers are the model's own. arguments.py has the options, probes.py finds the probe set, setup.py builds the engine
that fits a model, identity.py says what makes a series. May import probing, stats_head, ops, store, findings, compat.
"""
