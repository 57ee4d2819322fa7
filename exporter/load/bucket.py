"""A token bucket that brakes instead of shutting: what it holds back is sampling with a known ratio, and not loss.

Flows in: time and wishes. Flows out: the ratio with which the next event may be kept.
"""

from dataclasses import dataclass

_BRAKE = 0.25  # share of the bucket from which downwards the ratio falls with the fill
_LEAST = 1 / 64  # ratio of an empty bucket: something is always seen


@dataclass(slots=True)
class Bucket:
    """Holds a second's worth of tokens; an event that is kept takes one. Not safe from several threads."""

    rate: float
    """Tokens per second, and tokens at most."""
    tokens: float = 0.0
    filled_at: float = 0.0
    """When it was filled last, in seconds of the caller's clock, which never steps back."""

    def ratio(self, now: float) -> float:
        """Fill up, and give the ratio that the fill allows."""
        self.tokens = min(self.rate, self.tokens + (now - self.filled_at) * self.rate)
        self.filled_at = now
        return max(min(self.tokens / (self.rate * _BRAKE), 1.0), _LEAST)

    def take(self) -> None:
        """Take a token out, where there is one."""
        self.tokens = max(self.tokens - 1.0, 0.0)
