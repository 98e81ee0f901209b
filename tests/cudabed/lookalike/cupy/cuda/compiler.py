"""As cupy.cuda.compiler."""

from .._errors import CompileException  # noqa: F401
