"""Text leaves the gateway in whole characters, up to the first complete stop string, however tokens cut it."""

from hypothesis import given
from hypothesis import strategies as st

from corolla.gateway.text import Spelling, StopFinder

letters = st.text(alphabet="ab\n", max_size=40)


def cut(text, places):
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def first_stop(text, stops):
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return None


@given(letters, st.lists(st.integers(0, 40)), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=6), max_size=4))
def test_pieces_are_the_text_up_to_the_first_stop_string(text, places, stops):
    finder = StopFinder(stops)
    said = "".join(finder.push(piece) for piece in cut(text, places)) + finder.end()
    wanted = first_stop(text, stops)
    assert said == (text if wanted is None else wanted)
    assert (finder.found is None) == (wanted is None)


@given(st.text(max_size=20), st.text(max_size=20))
def test_tokens_of_single_bytes_spell_whole_characters(prompt, text):
    def decode(tokens):
        return bytes(tokens).decode(errors="replace")

    spelling = Spelling(decode, list(prompt.encode()))
    pieces = [spelling.push(token) for token in text.encode()]
    assert "".join(pieces) + spelling.end() == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, 255), max_size=20))
def test_broken_bytes_are_spelled_in_the_end(tokens):
    spelling = Spelling(lambda some: bytes(some).decode(errors="replace"), [])
    said = "".join([spelling.push(token) for token in tokens]) + spelling.end()
    assert said == bytes(tokens).decode(errors="replace")
