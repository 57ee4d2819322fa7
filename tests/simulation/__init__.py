"""A simulated kernel, ring and consumer in which the governor and its rivals are driven by made traces.

`python -m simulation` in tests/ prints the table of docs/load-management.md.
"""
