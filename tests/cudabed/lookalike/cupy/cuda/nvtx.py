"""As cupy.cuda.nvtx. ranges: the names of the ranges that are open."""

ranges: list = []


def RangePush(message: str, id_color: int = -1) -> None:
    ranges.append(str(message))


def RangePop() -> None:
    if not ranges:
        raise RuntimeError("RangePop without RangePush")
    ranges.pop()


def Mark(message: str, id_color: int = -1) -> None:
    pass
