"""Observers of the host. Each updates its own families and knows no other."""
