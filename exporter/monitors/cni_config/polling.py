"""The other rung: everything is looked at once per interval. The families are the same, changes are seen later."""

from exporter.contract import Context, Source
from exporter.monitors.cni_config.files import Reader
from exporter.monitors.cni_config.records import Records


class PollingSource(Source):
    """Looks again and again. Two changes of a file between two looks are one."""

    mode = "polling"

    def __init__(self, records: Records) -> None:
        """Fill `records`."""
        self._records = records
        self._reader = Reader()

    def open(self, context: Context) -> None:
        """Begin; there is nothing that could be missing."""
        super().open(context)

    def update(self) -> None:
        """Look."""
        self._records.take(self._reader.trees(self._records.settings.directories), self.context)
        self._records.tell_surroundings(self.context)
