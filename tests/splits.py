"""Windows of questions and paragraphs with any lengths, without a tokenizer."""

from hypothesis import strategies as st

from qat_runner.data.squad import Question, Ragged, Split, Tokens, make_windows


def split(lengths: list[tuple[int, int]], max_length: int, stride: int) -> Split:
    """Return a split of questions and paragraphs with these numbers of tokens; a paragraph token is one character."""
    contexts = ["".join(chr(97 + k % 26) for k in range(n)) for _, n in lengths]
    questions = [Question(str(i), "", i, (contexts[i][n // 2],), n // 2) for i, (_, n) in enumerate(lengths)]
    tokens = Tokens(
        Ragged.of([range(q) for q, _ in lengths]),
        Ragged.of([range(n) for _, n in lengths]),
        Ragged.of([[(k, k + 1) for k in range(n)] for _, n in lengths], (2,)),
    )
    return Split(contexts, questions, tokens, make_windows(tokens, questions, max_length, stride))


SPLITS = st.builds(
    split,
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 60)), min_size=1, max_size=5),
    st.integers(12, 24),
    st.integers(1, 30),
)
