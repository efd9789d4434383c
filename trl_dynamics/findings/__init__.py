"""findings: what a finding is, and how sure a change is. It knows no subject and needs no torch.

finding.py: severities, the parts of a finding, shared remedies. effects.py: a mean change over probes with its
standard error. Rules are in the subjects. May import statistics.
"""
