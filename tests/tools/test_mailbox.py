import pytest

from agile.errors import AgileError
from agile.tools.mailbox import Mail, Mailbox

MAILS = [
    Mail(3, "alice", "budget review", "on friday in rome"),
    Mail(5, "bruno", "budget call", "alice comes too"),
    Mail(9, "carol", "travel", "with bruno on friday"),
]


def ids(query: str, max_hits: int = 3) -> list[int]:
    return [mail.id for mail in Mailbox(MAILS, max_hits=max_hits).search(query)]


def test_a_search_finds_mails_with_every_word_the_best_first() -> None:
    assert ids("alice") == [3, 5]  # the sender counts for more than who is mentioned
    assert ids("BRUNO") == [5, 9]
    assert ids("budget alice") == ids(" alice  budget ") == [3, 5]
    assert ids("friday") == [9, 3]  # shorter texts first
    assert ids("alice travel") == []
    assert ids("budget", max_hits=1) == [5]


@pytest.mark.parametrize(
    "query", ["", " ", '"', "alice OR carol", "NOT alice", "sender:alice", "ali*", "(", "alice'; DROP", "\0", "^alice-"]
)
def test_what_is_typed_is_no_syntax(query: str) -> None:
    assert [m for m in ids(query) if m not in (3, 5)] == []


def test_mails_are_read_by_number() -> None:
    mailbox = Mailbox(MAILS)
    assert mailbox.read(5) == MAILS[1]
    assert mailbox.read(4) is None


def test_numbers_are_not_given_twice() -> None:
    with pytest.raises(AgileError, match="4 mails have 3 ids"):
        Mailbox([*MAILS, MAILS[0]])
