"""The commands of the wheel, one file each; ``tools/*.py`` and ``examples/pretrain_dynmoe.py`` are the same entries.

Each has ``main(argv) -> exit code`` and imports what takes seconds after the command line is read.
"""
