"""As cupy.cuda.device."""

from .. import _memory, _stream
from . import cublas, runtime


_blas: dict = {}


def get_cublas_handle() -> int:
    """One handle per device."""
    return _blas.setdefault(_memory.current_device(), cublas.create())


class Device:
    """As cupy.cuda.Device."""

    def __init__(self, device=None):
        self.id = _memory.current_device() if device is None else int(device)

    def __enter__(self):
        self._before = _memory.current_device()
        return self.use()

    def __exit__(self, *args):
        runtime.setDevice(self._before)

    def __int__(self) -> int:
        return self.id

    def use(self) -> "Device":
        runtime.setDevice(self.id)
        return self

    def synchronize(self) -> None:
        _stream.device_synchronize()

    @property
    def compute_capability(self) -> str:
        properties = runtime.getDeviceProperties(self.id)
        return f"{properties['major']}{properties['minor']}"

    @property
    def mem_info(self) -> tuple:
        return _memory.info()

    @property
    def pci_bus_id(self) -> str:
        return runtime.deviceGetPCIBusId(self.id)
