"""As cupy.cuda.stream."""

from .._stream import Event, Stream, get_current_stream, get_elapsed_time  # noqa: F401
