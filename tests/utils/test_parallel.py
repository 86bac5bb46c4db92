"""Threads: order, a bounded number of items under way, errors, and what a whole image is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from lit_prefopt.data.images import BrokenSample
from lit_prefopt.prepare.image_checks import check
from lit_prefopt.utils.parallel import AHEAD, cores, map_in_order
from tests.helpers.shards import picture


def test_results_keep_their_order_and_several_threads_work():
    together = threading.Barrier(3, timeout=20)  # passes only if three work at the same time

    def slow_at_first(number: int) -> int:
        if number < 3:
            together.wait()
        time.sleep(0.01 if number % 2 else 0)
        return number * number

    assert list(map_in_order(slow_at_first, range(20), 3)) == [n * n for n in range(20)]


def test_items_are_taken_as_they_are_needed():
    taken = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = map_in_order(lambda number: number, items(), 2)
    assert next(results) == 0
    assert len(taken) == 2 * AHEAD


def test_errors_come_out_and_end_the_threads():
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        list(map_in_order(lambda number: 1 // number, [2, 1, 0, 5], 2))
    assert threading.active_count() == before
    assert cores() >= 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_cut_at_any_place_is_noticed(form: str):
    data = picture(7, (48, 40), form)
    assert check(data).size == (48, 40)
    for end in range(len(data) - 4):  # the last four of a png are the checksum of nothing
        with pytest.raises(BrokenSample):
            check(data[:end])


def test_a_changed_byte_of_a_png_is_noticed():
    data = bytearray(picture(7, (48, 40)))
    data[data.find(b"IDAT") + 20] ^= 1
    with pytest.raises(BrokenSample, match="cannot be decoded"):
        check(bytes(data))
