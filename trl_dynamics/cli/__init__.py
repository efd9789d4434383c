"""cli: `trl-dynamics`, one module per command, each with `run(argv) -> int`; a command with actions is a folder.

A command reads its options, finds what they name, calls the library, writes and prints; what a notebook could use
belongs into another room. dispatch.py goes from names to modules. options.py declares and reads options, the only way
to do so. sources.py finds models and probe sets, inputs.py data, outputs.py checks where results go, finite.py gives
the status of numbers that are not finite. This room may import every other one; none may import it.
"""
