"""What several parts raise alike."""


class NothingToMeasureError(ValueError):
    """What was asked is in order, but this dictionary gives this text nothing to measure it by: no atom is alive, too
    few firings, every write is zero. A single evaluation raises it; a run over many reports it and continues."""


class DiskTooSmallError(ValueError):
    """What was asked for needs more room than the disk has. Nothing was computed."""
