"""Seeded choices that come out the same on every Python version."""

import random


class Chooser:
    """Makes choices from one seeded stream, built on `randrange` only."""

    def __init__(self, seed):
        self._stream = random.Random(seed)

    def between(self, low, high):
        """A whole number from low to high, both included."""
        return low + self._stream.randrange(high - low + 1)

    def pick(self, items):
        """One of the items."""
        return items[self._stream.randrange(len(items))]

    def several(self, items, count):
        """`count` different items, in a random order."""
        left = list(items)
        return [left.pop(self._stream.randrange(len(left))) for _ in range(count)]

    def weighted(self, items, weights):
        """One of the items, each as likely as its whole-number weight says."""
        point = self._stream.randrange(sum(weights))
        for item, weight in zip(items, weights):
            point -= weight
            if point < 0:
                return item
