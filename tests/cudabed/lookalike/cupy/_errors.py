"""Errors with the names and numbers of the CUDA runtime."""

NAMES = {1: "cudaErrorInvalidValue: invalid argument", 2: "cudaErrorMemoryAllocation: out of memory",
         100: "cudaErrorNoDevice: no CUDA-capable device is detected", 101: "cudaErrorInvalidDevice: invalid device ordinal",
         400: "cudaErrorInvalidResourceHandle: invalid resource handle",
         500: "cudaErrorSymbolNotFound: named symbol not found", 600: "cudaErrorNotReady: device not ready",
         716: "cudaErrorMisalignedAddress: misaligned address",
         900: "cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing",
         901: "cudaErrorStreamCaptureInvalidated: operation failed due to a previous error during capture",
         904: "cudaErrorStreamCaptureUnjoined: capture still has unjoined work",
         905: "cudaErrorStreamCaptureIsolation: dependency created on uncaptured work in another stream",
         907: "cudaErrorCapturedEvent: operation not permitted on an event last recorded in a capturing stream"}


class CUDARuntimeError(RuntimeError):
    """status: the number of the error; detail: what the look-alike has to say beyond CUDA's words."""

    def __init__(self, status: int, detail: str = ""):
        self.status = status
        super().__init__(NAMES.get(status, f"error {status}") + (f" ({detail})" if detail else ""))


class CompileException(Exception):
    """As cupy.cuda.compiler.CompileException."""


def check(status: int, detail: str = "") -> None:
    if status:
        raise CUDARuntimeError(status, detail)
