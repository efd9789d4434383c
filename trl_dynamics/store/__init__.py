"""store: rows on disk, whatever they are rows of. It knows no subject and needs neither torch nor a probe set.

A [`Kind`] (kind.py) says what rows look like; [`DynamicsStore`] (store.py) writes and reads them by step, keeps
meta.json, config.yaml and attachments, and is what a resumed run continues. Below it: manifest.py (which files count),
parts.py (exchange, merging, damage), parquet.py, files.py (the one write seam), lock.py, aside.py, migrate.py (earlier
schema versions), identity.py (what must not change on a resume). This room imports nothing of ours.
"""
