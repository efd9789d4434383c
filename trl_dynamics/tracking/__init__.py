"""tracking: keeping the records of a run inside a Trainer: when, at what cost, and what is said meanwhile.

callback.py and series.py keep the store; schedule.py, budget.py, cost.py and forecast.py decide when to score;
alerts.py, console.py and threads.py talk to the user. May import store, findings, probing, statistics, compat.
"""
