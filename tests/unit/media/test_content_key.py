import pytest

from shared.media.content_key import content_key, part_key


def test_every_part_changes_the_key():
    keys = {content_key(*parts) for parts in [("a", "m", "p"), ("b", "m", "p"), ("a", "n", "p")]}
    keys |= {content_key("a", "m", "q"), content_key("am", "", "p"), content_key("a", "", "mp")}
    assert len(keys) == 6
    assert all(len(key) == 64 for key in keys)


def test_parts_cannot_run_into_each_other():
    with pytest.raises(ValueError, match="line breaks"):
        content_key("a\nm", "p", "")


def test_a_part_has_a_key_of_its_own() -> None:
    whole = content_key("a", "m", "p")
    keys = {part_key(whole, index, count) for index, count in [(0, 2), (1, 2), (0, 3), (1, 3)]}
    assert len(keys | {whole}) == 5
    assert part_key(whole, 1, 12) != part_key(whole, 11, 2)
