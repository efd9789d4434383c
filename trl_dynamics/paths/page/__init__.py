"""paths/page: learning paths on a page.

sections.py says which charts, notes and tables a report shows; charts.py and levels.py draw them, tables.py fills the
tables, gaps.py says what is not finite, explorer.py and explorer.js show single probes.
"""
