"""Splits, pairs that follow from others, and questions that training has seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossenc.errors import DataError
from crossenc.pairs import read
from crossenc.splits import add_transitive, sizes, split_by_position, split_by_question, unseen

HEADER = "question1,question2,is_duplicate\n"


def test_positions_are_the_peers_and_sizes_fit():
    split = split_by_position(404_290, *sizes(404_290, None, None, "quora"))
    assert split["val"] == range(10_000)
    assert split["test"] == range(10_000, 20_000)
    assert len(split["train"]) == 384_290
    assert sizes(200, None, 0.25, "x") == (20, 50)
    assert sizes(10, 1, 2.0, "x") == (1, 2)
    assert sizes(10, 0.01, 0, "x") == (1, 0)
    with pytest.raises(DataError, match="leave none for training"):
        sizes(10, 5, 5, "x")
    for wrong in (1.5, -0.5, float("inf"), float("nan")):
        with pytest.raises(DataError, match=rf"--data.val_size {wrong}, .* a whole number, or a fraction under 1"):
            sizes(10, wrong, None, "x")


def test_no_question_stands_in_two_splits(quora: Path):
    table = read(str(quora / "train.tsv"))
    a, b = table["text_a"][:], table["text_b"][:]
    split = split_by_question(a, b, 800, 800)
    assert sorted(row for rows in split.values() for row in rows) == list(range(len(a)))
    assert len(split["val"]) == len(split["test"]) == 800
    questions = [{" ".join(t.casefold().split()) for row in rows for t in (a[row], b[row])} for rows in split.values()]
    assert sum(map(len, questions)) == len(set.union(*questions))
    assert split_by_question(a, b, 800, 800) == split
    for name in ("val", "test"):  # from all over the file
        assert len(a) * 0.4 < sum(split[name]) / 800 < len(a) * 0.6


def test_questions_that_hang_together_are_moved_as_a_whole():
    """The first three pairs fit neither dev nor test, though there is room for one or two of them."""
    split = split_by_question("abckmoq", "bcdlnpr", 2, 2)
    assert split["train"] == [0, 1, 2]
    assert (len(split["val"]), len(split["test"])) == (2, 2)


def test_pairs_follow_from_others_and_from_no_contradiction(write):
    rows = "a,b,1\nB ,c,1\nc,x,0\ny,x,1\nk,l,1\nl,m,1\nm,k,0\nm,a,0\nu,v,0.4\nq,p,0\np,q,1\nq,r,1\n"
    table = read(str(write("p.csv", HEADER + rows)))
    more = add_transitive(table)
    assert more.select(range(len(table))).to_list() == table.to_list()
    added = more.select(range(len(table), len(more))).to_list()
    found = {(frozenset((row["text_a"], row["text_b"])), row["label"]) for row in added}
    # a~b~c and x~y, which are apart; k, l, m and p, q, r contradict each other: they add nothing, to others neither.
    expected = {("ac", 1.0)} | {(one + two, 0.0) for one in "abc" for two in "xy"} - {("cx", 0.0)}
    assert found == {(frozenset(pair), label) for pair, label in expected}
    assert [row["row"] for row in added] == list(range(12, 12 + len(expected)))
    assert len(add_transitive(more)) == len(more)
    part = add_transitive(table.select([1, 2]))  # as a split leaves them
    assert part["row"][:] == [1, 2, 3]


def test_either_question_of_a_pair_may_have_been_seen(write):
    dev = read(str(write("dev.csv", HEADER + "B,x,1\ny,D,0\ny,z,1\nE \t F,y,1\n")))
    train = read(str(write("train.csv", HEADER + "a,b,1\nc,d,0\ne f,g,1\n")))
    assert unseen(dev, train).tolist() == [False, False, True, False]
