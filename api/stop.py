"""Stop strings in a stream of text, wherever the tokens happen to be cut.

One Knuth-Morris-Pratt automaton per stop string reads the text character by character. The text ends before the
first stop string to be completed, whatever the size of the pieces it came in. Text that could still become a stop
string is held back; it is never more than the longest stop string less one character.
"""


class StopStrings:
    """The stop strings of one request with their automata; shared by all of its sequences. At least one, none empty."""

    __slots__ = ("failures", "first_characters", "strings")

    def __init__(self, strings: list[str]):
        assert strings
        assert all(strings)
        self.strings = tuple(dict.fromkeys(strings))
        self.failures = tuple(_failure_function(string) for string in self.strings)
        self.first_characters = frozenset(string[0] for string in self.strings)


class StopMatcher:
    """Passes text on until a stop string is complete."""

    __slots__ = ("_held", "_include_stop", "_states", "_stops", "matched")

    def __init__(self, stops: StopStrings, include_stop: bool = False):
        self._stops = stops
        self._include_stop = include_stop
        self._states = [0] * len(stops.strings)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that is now certain to come before any stop string. Nothing more comes once `matched` is set."""
        assert self.matched is None
        if not self._held and self._stops.first_characters.isdisjoint(text):
            return text
        buffer = self._held + text
        begin = len(self._held)
        states = self._states
        strings, failures = self._stops.strings, self._stops.failures
        for position in range(begin, len(buffer)):
            character = buffer[position]
            complete = -1
            for i, string in enumerate(strings):
                state = states[i]
                while state and string[state] != character:
                    state = failures[i][state - 1]
                if string[state] == character:
                    state += 1
                if state == len(string):
                    if complete < 0 or len(string) > len(strings[complete]):
                        complete = i
                    state = 0
                states[i] = state
            if complete >= 0:
                self.matched = strings[complete]
                self._held = ""
                end = position + 1
                return buffer[:end] if self._include_stop else buffer[: end - len(self.matched)]
        num_held = max(states)
        self._held = buffer[len(buffer) - num_held :]
        return buffer[: len(buffer) - num_held]

    def flush(self) -> str:
        """What was held back, when the sequence ended for another reason."""
        held, self._held = self._held, ""
        return held


def _failure_function(string: str) -> list[int]:
    """``failure[i]``: the length of the longest proper prefix of ``string[: i + 1]`` that is also its suffix."""
    failure = [0] * len(string)
    state = 0
    for i in range(1, len(string)):
        while state and string[i] != string[state]:
            state = failure[state - 1]
        if string[i] == string[state]:
            state += 1
        failure[i] = state
    return failure
