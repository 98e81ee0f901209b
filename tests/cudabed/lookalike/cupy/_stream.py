"""Streams that do nothing until they must.

Work put on a stream waits in its queue. It runs when somebody waits for it (synchronise: only what
that needs runs) or asks for it (`done`: a random number of items runs first). A program that forgot
to wait therefore reads old data, every time.

Environment: LOOKALIKE_SEED   seed of the random numbers                                     [0]
             LOOKALIKE_EAGER  chance that putting work on a stream runs an item of some stream [0]
"""

from __future__ import annotations

import collections
import itertools
import os
import random
import threading
import weakref

from ._errors import CUDARuntimeError
from ._items import Capture, Item

launches: collections.Counter = collections.Counter()  # put on a stream by the host, by name; a graph is one launch
_lock = threading.RLock()
_random = random.Random(int(os.environ.get("LOOKALIKE_SEED", "0")))
_eager = float(os.environ.get("LOOKALIKE_EAGER", "0"))
_pointers = itertools.count(0x1000, 16)
_busy: dict = {}  # streams with work in their queue, in order of their first item
_captures: set = set()  # captures that have not ended
_local = threading.local()


class Stream:
    """As cupy.cuda.Stream."""

    null: "Stream"

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        self.ptr = 0 if null else next(_pointers)
        self.is_non_blocking, self.priority = non_blocking, priority or 0
        self.device_id = -1 if null else 0
        self._queue: collections.deque = collections.deque()
        self._capture: Capture | None = None
        by_pointer[self.ptr] = self

    def __enter__(self):
        _stack().append(self)
        return self

    def __exit__(self, *args):
        _stack().pop()

    def __repr__(self):
        return f"<Stream {self.ptr:#x}, {len(self._queue)} items wait>"

    def use(self):
        _stack()[-1] = self
        return self

    @property
    def done(self) -> bool:
        with _lock:
            self._refuse_capture("done")
            _run_some(self)
            return not self._queue

    def synchronize(self) -> None:
        with _lock:
            self._refuse_capture("synchronize")
            while self._queue:
                _finish(self._queue[-1])

    def record(self, event=None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        """What is put here later runs after what the event marks now; nothing where it was never recorded."""
        with _lock:
            item = event._item
            if item is None:
                return
            if item.capture is not None and self._capture is None:
                if item.capture not in _captures:
                    raise CUDARuntimeError(907)
                self._capture = item.capture  # this stream joins the recording
            if self._capture is not item.capture:
                self._break(905)
            if not item.done:
                put(self, after=item)

    def launch_host_func(self, callback, arg) -> None:
        put(self, lambda: callback(arg), "host function")

    def begin_capture(self, mode=None) -> None:
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        with _lock:
            self._refuse_capture("begin_capture")
            self._capture = Capture(self)
            _captures.add(self._capture)

    def end_capture(self) -> "Graph":
        with _lock:
            capture = self._capture
            if capture is None or capture.origin is not self:
                raise CUDARuntimeError(1, "this stream did not begin a capture")
            for stream in set(capture.last) | {self}:
                stream._capture = None
            _captures.discard(capture)
            if capture.broken:
                raise CUDARuntimeError(901)
            if not capture.joined():
                raise CUDARuntimeError(904)
            return Graph(capture.nodes)

    def is_capturing(self) -> bool:
        return self._capture is not None

    def _break(self, status: int, detail: str = "") -> None:
        """The error of a forbidden call; it spoils the capture too."""
        if self._capture is not None:
            self._capture.broken = True
        raise CUDARuntimeError(status, detail)

    def _refuse_capture(self, what: str) -> None:
        if self._capture is not None:
            self._break(900, what)


by_pointer: dict = {}
events: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # by pointer
Stream.null = Stream(null=True)


def _stack() -> list:
    if not hasattr(_local, "stack"):
        _local.stack = [Stream.null]
    return _local.stack


def get_current_stream(device_id: int = -1) -> Stream:
    return _stack()[-1]


class Event:
    """As cupy.cuda.Event."""

    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.ptr = next(_pointers)
        self.timing, self._item = not disable_timing, None
        events[self.ptr] = self

    def record(self, stream: Stream | None = None) -> None:
        self._item = put(stream or get_current_stream())

    @property
    def done(self) -> bool:
        with _lock:
            self._refuse_capture()
            if self._item is not None and not self._item.done:
                _run_some(self._item.stream)
            return self._item is None or self._item.done

    def synchronize(self) -> None:
        with _lock:
            self._refuse_capture()
            if self._item is not None:
                _finish(self._item)

    def _refuse_capture(self) -> None:
        if self._item is not None and self._item.capture is not None:
            self._item.capture.broken = True
            raise CUDARuntimeError(907)


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Milliseconds between two events that are done."""
    for event in (start_event, end_event):
        event._refuse_capture()
        if event._item is None or not event.timing:
            raise CUDARuntimeError(400, "an event that was not recorded, or keeps no time")
        if not event._item.done:
            raise CUDARuntimeError(600)
    return (end_event._item.time - start_event._item.time) * 1e3


class Graph:
    """As cupy.cuda.Graph: nodes of a capture. Branches are replayed in a random order that keeps their dependencies."""

    def __init__(self, nodes: list):
        self.nodes = nodes

    def launch(self, stream: Stream | None = None) -> None:
        stream = stream or get_current_stream()
        stream._refuse_capture("a graph inside a graph: the look-alike has none")
        put(stream, self._run, "graph")

    def upload(self, stream: Stream | None = None) -> None:
        """Nothing to do: a launch finds all it needs."""

    def _run(self) -> None:
        lanes: dict = {}
        for node in self.nodes:
            node.done = False
            lanes.setdefault(node.stream, collections.deque()).append(node)
        while lanes:
            ready = [s for s, lane in lanes.items() if lane[0].after is None or lane[0].after.done]
            stream = _random.choice(ready)
            lanes[stream].popleft().execute()
            if not lanes[stream]:
                del lanes[stream]


# ---------------------------------------------------------------- queues
def put(stream: Stream, run=None, name: str | None = None, after: Item | None = None) -> Item:
    """Puts work on a stream (a graph's node while it captures); the item that stands for it."""
    with _lock:
        if stream._capture is not None:
            return stream._capture.add(stream, run, name, after)
        if name:
            launches[name] += 1
        # The null stream and blocking streams wait for each other, as CUDA's legacy default stream does.
        if stream is Stream.null:
            others = [s for s in _busy if s is not stream and not s.is_non_blocking]
        else:
            others = [] if stream.is_non_blocking or not Stream.null._queue else [Stream.null]
        for other in others:
            stream._queue.append(Item(stream, None, None, other._queue[-1]))
        item = Item(stream, run, name, after)
        stream._queue.append(item)
        _busy[stream] = True
        if _eager and _random.random() < _eager:
            _step(_random.choice(list(_busy)))
        return item


def _step(stream: Stream) -> None:
    """Runs one item: the first of the stream, or the first of what that waits for."""
    item = stream._queue[0]
    while item.after is not None and not item.after.done:
        item = item.after.stream._queue[0]
    item.stream._queue.popleft()
    if not item.stream._queue:
        _busy.pop(item.stream, None)
    item.execute()


def _run_some(stream: Stream) -> None:
    for _ in range(_random.choice((0, 0, 1, 2, 4, 8, 16))):
        if stream._queue:
            _step(stream)


def _finish(item: Item) -> None:
    while not item.done:
        _step(item.stream)


def device_synchronize() -> None:
    """All work of all streams."""
    with _lock:
        refuse_captures("deviceSynchronize")
        while _busy:
            _step(next(iter(_busy)))


def refuse_captures(what: str) -> None:
    """The error of a call that is forbidden while any stream captures."""
    for capture in list(_captures):
        capture.broken = True
        raise CUDARuntimeError(900, what)
