"""Readers of the host: netlink, procfs, cgroups. Roots go in, plain records come out; they know nothing of metrics."""
