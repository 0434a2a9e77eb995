"""What several evaluations raise alike."""


class NothingToMeasureError(ValueError):
    """What was asked is in order, but this dictionary gives this text nothing to measure it by: no atom is alive, too
    few firings, every write is zero. A single evaluation raises it; a run over many states it in its report and goes
    on."""
