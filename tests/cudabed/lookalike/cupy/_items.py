"""What waits on a stream, and what a capture records."""

from __future__ import annotations

import collections
import time

executed: collections.Counter = collections.Counter()  # run by the device, by name; inside graphs too


class Item:
    """Something on a stream: work to run (or None: a mark), and an item of another stream that must be done before."""

    __slots__ = ("stream", "run", "name", "after", "done", "time", "capture", "before")

    def __init__(self, stream, run, name, after, capture=None, before=None):
        self.stream, self.run, self.name, self.after = stream, run, name, after
        self.done, self.time, self.capture, self.before = False, None, capture, before

    def execute(self) -> None:
        self.done = True
        if self.name:
            executed[self.name] += 1
        if self.run:
            self.run()
        self.time = time.perf_counter()


class Capture:
    """The nodes of a graph that is being recorded: items, in the order in which they came."""

    def __init__(self, origin):
        self.origin, self.nodes, self.last, self.broken = origin, [], {}, False

    def add(self, stream, run, name, after) -> Item:
        node = Item(stream, run, name, after, self, self.last.get(stream))
        self.nodes.append(node)
        self.last[stream] = node
        return node

    def joined(self) -> bool:
        """Whether the end of the origin stream comes after every node."""
        reached, todo = set(), [self.last.get(self.origin)]
        while todo:
            node = todo.pop()
            if node is not None and id(node) not in reached:
                reached.add(id(node))
                todo += [node.before, node.after]
        return len(reached) == len(self.nodes)
