"""The tasks made of Python's library, on a library of a few lines."""

import json

from bdlora_perf.quality.stdlib_tasks import Library, json_pairs

_SOURCE = '''
"""About a module."""

def basename(path):
    """Return the last part of a path.

    Nothing else.
    """
    return path.split("/")[-1]

def _hidden():
    """Not for users."""

def unfinished():
    """without a full stop"""

class Name:
    """A class has no name to guess."""

    async def same(self):
        """Return the last part of a path."""
'''


def test_what_is_taken_of_the_source() -> None:
    library = Library.read([_SOURCE, "x = 1", "no source {"])
    assert "About a module." in library.docstrings and len(library.docstrings) == 6
    assert library.summaries == {"Return the last part of a path.": "basename"}, "the first of equal ones"
    assert '"""' not in library.code and "path.split" in library.code and "x = 1" in library.code


def test_completions_are_the_json_of_what_is_given() -> None:
    pairs = json_pairs(0)
    assert pairs == json_pairs(0) != json_pairs(1) and len(set(pairs)) == len(pairs) > 1000
    for prompt, completion in pairs:
        given = [words.rsplit(" is ", 1) for words in prompt.removesuffix(":").split(", ")]
        assert {name: str(value) for name, value in json.loads(completion).items()} == dict(given)
