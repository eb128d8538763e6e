"""1,200 damaged checkpoints, texts, states, folders and flags: a sentence, or right. fuzz.py says how."""

import fuzz


def test_what_is_damaged_is_refused_in_a_sentence_or_right():
    counts = fuzz.run(1200, 0)
    assert sum(map(sum, counts.values())) == 1200
    mended = ("state", "cache")  # passed over, or made again
    assert all(counts[kind][0] == 0 for kind in mended)
    assert all(counts[kind][0] > 0 for kind in counts if kind not in mended)
