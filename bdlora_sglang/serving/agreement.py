"""Ranks load an adapter together or not at all.

Each rank reads its own part, so one rank alone can fail: its part is corrupt, its node lacks the file, its memory is
full. SGLang's scheduler answers with the first rank's result only, and a rank without the adapter would die at the
first request for it.
"""

from collections.abc import Callable, Sequence

from sglang.srt.managers.io_struct import LoRAUpdateOutput

# SGLang: `GroupCoordinator.all_gather_object`.
AllGather = Callable[[str | None], Sequence[str | None]]


def load_together(
    load: Callable[[], LoRAUpdateOutput],
    unload: Callable[[], LoRAUpdateOutput],
    all_gather: AllGather,
) -> LoRAUpdateOutput:
    """Run ``load`` on every rank; where any rank failed, ``unload`` on those that did not, and report every reason.

    Args:
        load: loads on this rank; it may raise.
        unload: undoes a load that succeeded.
        all_gather: hands each rank's error (None: no error) to all ranks, in rank order.

    Returns:
        This rank's result, with the same ``success`` on every rank.
    """
    result: LoRAUpdateOutput | None = None
    error: str | None = None
    try:
        result = load()
        error = None if result.success else result.error_message
    # A rank that raised must still take part, or the others wait for it for ever.
    except Exception as exception:
        error = str(exception) or repr(exception)
    errors = all_gather(error)
    if not any(errors):
        assert result is not None
        return result
    loaded = unload().loaded_adapters if result is not None and result.success else None
    if result is not None and loaded is None:
        loaded = result.loaded_adapters
    return LoRAUpdateOutput(success=False, error_message=_describe(errors), loaded_adapters=loaded)


def _describe(errors: Sequence[str | None]) -> str:
    """The one reason when all ranks agree on it, else each reason with its rank."""
    if len(set(errors)) == 1:
        return errors[0] or ""
    return "; ".join(f"TP rank {rank}: {error}" for rank, error in enumerate(errors) if error)
