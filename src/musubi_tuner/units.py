"""Sizes and times as people read them. Torch-free."""

Bytes = int


def format_bytes(size: float) -> str:
    """Bytes as GiB, or MiB below a tenth of one."""
    return f"{size / 2**30:.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"


def format_seconds(seconds: float) -> str:
    """42s, 3m05s, 2h07m, 3d04h."""
    whole = int(seconds)
    for limit, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= limit:
            return f"{whole // limit}{unit}{whole % limit // below:02d}{small}"
    return f"{whole}s"
