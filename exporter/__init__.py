"""cni-exporter: container networking of a Linux node as Prometheus metrics."""

__version__ = "0.1.0"
