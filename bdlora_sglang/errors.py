"""The errors that a user can cause. The command line turns each into its message and exit code 1."""


class BDLoRAError(ValueError):
    """A request that cannot be carried out, with a message for the user."""


class AdapterError(BDLoRAError):
    """An adapter that cannot be used.

    The message names the file (or the adapter, when it came as tensors), the tensor or field, what was found there and
    what was expected.
    """

    def __init__(self, source: str, subject: str, found: object, expected: object) -> None:
        super().__init__(f"{source}: {subject}: found {found}, expected {expected}")
        self.source = source
        self.subject = subject
        self.found = found
        self.expected = expected

    def __reduce__(self) -> tuple[type, tuple[str, str, object, object]]:
        # Exceptions pickle as type(*args), and args holds the formatted message alone.
        return type(self), (self.source, self.subject, self.found, self.expected)
